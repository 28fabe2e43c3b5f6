"""Every key of a recipe as a page of Markdown, made from the schema.

`python -m dtrain.config.reference > dtrain/recipes/README.md`
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe
from dtrain.config.schema_paths import subgroups

_HEAD = """# Recipes

<!-- Made by `python -m dtrain.config.reference`; a test keeps it true. -->

One YAML file (version 1.2) is one run. `dtrain recipes` lists the files in this folder,
`dtrain recipes copy NAME` gives you one to edit, and `dtrain check RECIPE` shows what a recipe
comes to, or everything that is wrong with it. Any key can be changed for one run:

    dtrain run tiny engine.kind=zero3 stages.domain.train.steps=20 output.folder=runs/other

A list is entered by number (`stages.0`) or by the name of an entry (`stages.domain`). An unknown
key is an error. A path is taken from the folder in which `dtrain` is started.
"""

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true, false"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def reference() -> str:
    """The page."""
    return _HEAD + "".join([*_sections(Recipe, "", {}), *_engine_table()])


def _sections(group: type[BaseModel], path: str, documented: dict[type, str]) -> Iterator[str]:
    """A table of the group's own keys, then the sections of the groups in it.

    `documented`: the path of each group that has its section already.
    """
    yield f"\n## {path or 'The recipe'}\n\n{_first_paragraph(group)}\n\n"
    if group in documented:
        yield f"The keys are those of {documented[group]}.\n"
        return
    documented[group] = path
    yield "| key | value | default | meaning |\n|---|---|---|---|\n"
    for name, field in group.model_fields.items():
        yield f"| `{name}` | {_value(field)} | {_default(field)} | {_meaning(field)} |\n"
    for name, field in group.model_fields.items():
        here = f"{path}.{name}" if path else name
        groups = subgroups(field.annotation)
        for inner, suffix in groups:
            kinds = f", kind {' or '.join(_kinds(inner))}" if len(groups) > 1 else ""
            yield from _sections(inner, here + suffix + kinds, documented)


def _engine_table() -> Iterator[str]:
    """What each engine supports."""
    yield "\n## Engines\n\n"
    columns = {
        "base sharded": "shards_base",
        "gradients sharded": "shards_gradients",
        "optimizer sharded": "shards_optimizer",
        "`shard`": "shard_group",
        "`offload`": "offload",
        "`config`": "is_deepspeed",
        "8-bit optimizers": "eight_bit_optimizer",
        "`determinism: strict`": "strict",
        "`plan --exact`": "simulated",
    }
    yield f"| engine | use it for | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|\n"
    for kind, engine in ENGINES.items():
        cells = ["yes" if getattr(engine, field) else "no" for field in columns.values()]
        yield f"| `{kind}` | {engine.use_case} ({engine.title}) | {' | '.join(cells)} |\n"


def _kinds(model: type[BaseModel]) -> tuple[str, ...]:
    return get_args(model.model_fields["kind"].annotation)


def _first_paragraph(group: type[BaseModel]) -> str:
    return (group.__doc__ or "").strip().partition("\n\n")[0]


def _meaning(field: FieldInfo) -> str:
    if field.description:
        return field.description.replace("|", "\\|")
    docs = [_first_paragraph(model) for model, _ in subgroups(field.annotation)]
    return docs[0].rstrip(".") if len(docs) == 1 else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, BaseModel | dict):
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _value(field: FieldInfo) -> str:
    return _type(field.annotation) + _bounds(field.metadata)


def _type(annotation: Any) -> str:
    """What may be written, in words."""
    kind, arguments = get_origin(annotation), get_args(annotation)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if kind is Annotated:
        metadata = [m for extra in arguments[1:] for m in getattr(extra, "metadata", [extra])]
        return _type(arguments[0]) + _bounds(metadata)
    if kind is Literal:
        return ", ".join(f"`{option}`" for option in arguments)
    if kind is list:
        return f"list of {'groups' if subgroups(annotation) else _type(arguments[0]) + 's'}"
    if kind is dict:
        return "groups by name" if subgroups(annotation) else f"{_type(arguments[-1])}s by name"
    if kind in (Union, types.UnionType):
        parts = [_type(part) for part in arguments if part is not type(None)]
        return " or ".join(dict.fromkeys(parts))
    return "group"


def _bounds(metadata: list[Any]) -> str:
    bounds = [
        f" {sign} {_number(getattr(item, name))}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if getattr(item, name, None) is not None
    ]
    return ",".join(bounds)


def _number(bound: float) -> str:
    return "2⁶³" if bound == 2**63 else f"{bound:g}"


if __name__ == "__main__":
    print(reference(), end="")
