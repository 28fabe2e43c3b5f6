"""An adapter from elsewhere whose training a stage continues (`method.from_adapter`).

Its values are what the stage starts from; optimizer and schedule start from zero. The adapter must
say the same of itself as the recipe does, and have been trained on the stage's base.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from dtrain.checkpoints.parameter_shards import WEIGHT_KINDS, ParameterShard
from dtrain.config.methods import over_nf4
from dtrain.config.methods.patterns import match_names
from dtrain.config.schema import Stage
from dtrain.core.cache_paths import local_path, user_path
from dtrain.core.errors import Exit, UserError
from dtrain.core.log import say, warn
from dtrain.core.stage_dir import ADAPTER_CONFIG, read_merge_manifest
from dtrain.core.weight_files import weight_files
from dtrain.distributed.tensor_utils import all_finite
from dtrain.merge.adapter_tensors import AdapterFile
from dtrain.merge.provenance import adapter_origin, expected_bases, model_fingerprint
from dtrain.merge.weight_delta import INITIALIZATIONS, WITHOUT_EFFECT
from dtrain.methods.adapter import loadable_config
from dtrain.methods.saved_modules import saved_buffers
from dtrain.models.peft_format import adapter_base, file_key, read_adapter_config
from dtrain.models.token_rows import MARK

if TYPE_CHECKING:
    from dtrain.pipeline.stage_record import StageSetup

WHERE = "method.from_adapter"
# Where the recipe does not use PEFT's name.
RECIPE_KEYS = {"lora_alpha": "alpha", "trainable_token_indices": "rows of model.tokens"}
# Tied matrices are compared by value.
NOT_COMPARED = WITHOUT_EFFECT | {"ensure_weight_tying", "init_lora_weights"}


@dataclass(frozen=True)
class InitialAdapter:
    """The values of an adapter's folder.

    Attributes:
        keys: parameter of the model → key in the file.
    """

    file: AdapterFile
    keys: dict[str, str]

    def read(self, name: str) -> Tensor:
        """A whole parameter, float32."""
        return self.file.get(self.keys[name])

    @torch.no_grad()
    def restore(self, shards: Iterable[ParameterShard]) -> None:
        """Copy the values into an engine's parameter shards."""
        for shard in shards:
            if shard.start < shard.stop:
                values = self.read(shard.name).reshape(-1)[shard.start : shard.stop]
                for kind in shard.tensors.keys() & WEIGHT_KINDS:
                    shard.tensors[kind].copy_(values)


def check_initial_adapter(stage: Stage, model: nn.Module) -> InitialAdapter | None:
    """The adapter that a stage continues, checked against its model; None if it starts a new one.

    Args:
        model: with the stage's adapter attached.

    Raises:
        UserError: it has other settings or layers, is no safetensors file, or has a value that is
            not finite.
    """
    adapter = stage.method.adapter
    if adapter is None or adapter.initial_adapter is None:
        return None
    folder = local_path(adapter.initial_adapter)
    _check_settings(folder, model)
    file = AdapterFile(folder)
    return InitialAdapter(file, _match_tensors(folder, file, model))


def open_initial_adapter(setup: StageSetup, model: nn.Module) -> InitialAdapter | None:
    """Open the adapter that a stage continues, checked; None if the stage starts a new one.

    Args:
        model: with the stage's adapter attached.

    Raises:
        UserError: as `check_initial_adapter`, or it was trained on another base.
    """
    initial = check_initial_adapter(setup.stage, model)
    if initial is not None:
        folder = initial.file.folder
        _check_base(folder, setup)
        stage = setup.stage.name
        say(f"the training of {folder} continues: its values are the first of stage {stage}")
    return initial


def _check_settings(folder: Path, model: nn.Module) -> None:
    assert isinstance(model, PeftModel)
    ours = _plain(loadable_config(model).to_dict())
    theirs = read_adapter_config(folder)
    # Others name experts by the end of their names, dtrain each by its whole name.
    named, targets = ours.get("target_parameters") or [], theirs.get("target_parameters") or []
    if all(match_names(named, [target]) for target in targets):
        theirs["target_parameters"] = match_names(named, targets)
    lines = [
        f"{RECIPE_KEYS.get(key, key)}: {theirs.get(key)!r} in the adapter, {ours.get(key)!r} here"
        for key in sorted((ours.keys() | theirs.keys()) - NOT_COMPARED)
        if _comparable(ours.get(key)) != _comparable(theirs.get(key))
    ]
    if theirs.get("init_lora_weights") not in INITIALIZATIONS:
        lines.append(f"init_lora_weights: {theirs['init_lora_weights']!r} changes the base")
    if lines:
        fix = "write the adapter's settings into the recipe, or start a new adapter"
        what = f"has other settings than the recipe's method: {'; '.join(lines)}"
        raise UserError(what, where=f"{WHERE}: {folder / ADAPTER_CONFIG}", fix=fix)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """Settings as adapter_config.json has them."""
    return dict(json.loads(json.dumps(content, default=sorted)))


def _comparable(value: Any) -> Any:
    """Equal for an empty and a missing setting, and whatever the order of a list."""
    return (sorted(value) if isinstance(value, list) else value) or None


def _match_tensors(folder: Path, file: AdapterFile, model: nn.Module) -> dict[str, str]:
    """Parameter → key, for all that trains."""
    where = f"{WHERE}: {folder}"
    keys, first = dict[str, str](), dict[nn.Parameter, str]()
    expected, tied = dict[str, list[int]](), list[tuple[str, str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        if MARK in name and parameter in first:
            continue  # tied rows are saved once
        key = file_key(name)
        expected[key] = list(parameter.shape)
        if (other := first.setdefault(parameter, key)) == key:
            keys[name] = key
        else:
            tied.append((other, key))
    frozen = {file_key(name) for name in saved_buffers(model)}
    for problem, odd in (
        ("that the stage trains are not in it", sorted(expected.keys() - file.shapes.keys())),
        (
            "of it are not trained by the stage",
            sorted(file.shapes.keys() - expected.keys() - frozen),
        ),
    ):
        if odd:
            message = f"{len(odd)} tensors {problem}: {', '.join(odd[:3])}"
            fix = "name the same layers: method.target_modules, modules_to_save and router"
            raise UserError(message, where=where, fix=fix)
    for key, shape in expected.items():
        if file.shapes[key] != shape:
            raise UserError(
                f"{key} is {file.shapes[key]} in it, {shape} here",
                where=where,
                fix="continue it on the base that it was trained on, with as many experts",
            )
    for first_key, key in tied:
        if not torch.equal(file.get(first_key), file.get(key)):
            message = f"trained {first_key} and {key} apart, which are one matrix in the base"
            raise UserError(message, where=where, fix="merge it, and start from the merged model")
    for key in expected:
        if not all_finite(file.get(key)):
            raise UserError(f"{key} is not finite", where=where, status=Exit.NON_FINITE)
    return keys


def _check_base(folder: Path, setup: StageSetup) -> None:
    """Check that the adapter belongs to the stage's base, as far as anything says so."""
    where, fix = f"{WHERE}: {folder}", "continue it on the base that it was trained on"
    origin = adapter_origin(folder)
    fingerprint = _base_fingerprint(setup)
    if origin is not None:
        expected = expected_bases(setup.base, [origin])
        if expected and fingerprint not in expected:
            raise UserError("was trained on another base", where=where, fix=fix)
        if origin.base_in_nf4 != setup.method.traits.quantizes_base:
            bits = "in NF4" if origin.base_in_nf4 else "in 16 or 32 bits"
            fix = "method.quantize=null, or method.kind=lora"
            if origin.base_in_nf4:
                _, fix = over_nf4(setup.stage.method)
            raise UserError(f"was trained over its base {bits}", where=where, fix=fix)
        return
    named = adapter_base(folder)
    base = user_path(named) if named else None
    if base is not None and base.is_dir() and weight_files(base):
        if model_fingerprint(base) != fingerprint:
            raise UserError(f"was trained on another base, {base}", where=where, fix=fix)
    elif named != setup.recipe.model.base or setup.base != setup.inputs.base:
        warn(f"{folder} names {named!r} as its base: whether that is this one cannot be checked")


def _base_fingerprint(setup: StageSetup) -> str:
    if setup.base == setup.inputs.base:
        return setup.inputs.base_fingerprint
    return str(read_merge_manifest(setup.base, "result")["result"])
