"""Several adapters of one base: a stage with `adapters` stands for one stage per adapter.

    - name: task                          - {name: task-legal, adapter_name: legal, data: {…}}
      data: {sequence_length: 2048}   →   - {name: task-code, adapter_name: code, data: {…}}
      adapters:
        legal: {sources: [{path: legal.jsonl}]}
        code: {sources: [{path: code.jsonl}]}

They start from the same model. Everything after the loading of a recipe knows stages only.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from dtrain.config.yaml_document import Key, YamlDocument, dotted
from dtrain.core.errors import UserError

ADAPTERS, KEYS = "adapters", ("sources", "replay")


def expand_adapters(document: YamlDocument) -> list[UserError]:
    """Replace each stage with `adapters` by its stages; return what is wrong with the others.

    The lines of the new stages' keys are those of the keys that they come from.
    """
    stages = document.values.get("stages")
    if not isinstance(stages, list):
        return []
    faults: list[UserError] = []
    origins, expanded = dict[Key, str](), list[Any]()
    for number, stage in enumerate(stages):
        key: Key = ("stages", number)
        if not isinstance(stage, dict) or ADAPTERS not in stage:
            _move(document.origins, key, ("stages", len(expanded)), origins)
            expanded.append(stage)
            continue
        if fault := _find_fault(document, stage, (*key, ADAPTERS)):
            faults.append(fault)
            continue
        for name in stage[ADAPTERS]:
            target: Key = ("stages", len(expanded))
            _move(document.origins, key, target, origins)
            _move(document.origins, (*key, ADAPTERS, name), (*target, "data"), origins)
            origins[(*target, "adapter_name")] = document.where((*key, ADAPTERS, name))
            expanded.append(_stage_of(stage, name))
    outside = {
        key: line for key, line in document.origins.items() if len(key) < 2 or key[0] != "stages"
    }
    document.values["stages"], document.origins = expanded, outside | origins
    return faults


def _move(origins: dict[Key, str], old: Key, new: Key, target: dict[Key, str]) -> None:
    """Copy the lines of a key and of all in it."""
    length = len(old)
    target |= {(*new, *k[length:]): line for k, line in origins.items() if k[:length] == old}


def _stage_of(stage: dict[str, Any], name: str) -> dict[str, Any]:
    result = deepcopy({key: value for key, value in stage.items() if key != ADAPTERS})
    result |= {"name": f"{stage.get('name')}-{name}", "adapter_name": name}
    result["data"] = {**(result.get("data") or {}), **deepcopy(stage[ADAPTERS][name])}
    return result


def _find_fault(document: YamlDocument, stage: dict[str, Any], key: Key) -> UserError | None:
    where, adapters = document.where(key), stage[ADAPTERS]
    example = "adapters: {legal: {sources: [...]}, code: {sources: [...]}}"
    if not isinstance(adapters, dict) or not adapters:
        return UserError(f"{dotted(key)} must be groups by name", where=where, fix=example)
    data = stage.get("data")
    if data is not None and not isinstance(data, dict):
        return UserError(f"{dotted((*key[:-1], 'data'))} must be a group of keys", where=where)
    if both := [name for name in KEYS if name in (data or {})]:
        at = dotted((*key[:-1], "data", both[0]))
        message = f"{dotted(key)} and {at}: each adapter has its own {both[0]}"
        return UserError(message, where=where, fix=f"move {both[0]} into the adapters")
    for name, group in adapters.items():
        if not isinstance(group, dict) or "sources" not in group or group.keys() - set(KEYS):
            message = f"{dotted((*key, name))} must have sources, may have replay, and nothing else"
            return UserError(message, where=document.where((*key, name)), fix=example)
    return None
