"""pydantic's complaints about a recipe, in plain English, one a key."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Document, Key, dotted
from dtrain.core.errors import UserError

_LONGEST_VALUE = 60

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "string_too_short": "a text that is not empty",
    "string_pattern_mismatch": "letters, digits, dots, dashes and underscores, the first of them "
    "a letter or a digit",
    "list_type": "a list",
    "dict_type": "a group of keys",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "too_short": "a list with at least one entry",
}

_BOUNDS = {
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
}


def problems(error: ValidationError, document: Document) -> dict[Key, UserError]:
    """What is wrong with the document: key → error with its place, in the order of the file."""
    found: dict[Key, list[Mapping[str, Any]]] = {}
    branches: set[Key] = set()
    for detail in error.errors():
        key, is_branch = _real_key(detail["loc"], document.values)
        found.setdefault(_at_tag(key, detail), []).append(detail)
        if is_branch:
            branches.add(key)
    # A list of the wrong things is told at its entries, not again as "must be all-linear".
    noise = {b for b in branches if any(k[: len(b)] == b and k != b for k in found)}
    return {
        key: _problem(key, details, document) for key, details in found.items() if key not in noise
    }


def _real_key(loc: tuple[str | int, ...], values: Any) -> tuple[Key, bool]:
    """The way through the document: `loc` without the branches of unions that pydantic adds.

    Second: whether the last part was such a branch.
    """
    key: list[str | int] = []
    for number, part in enumerate(loc):
        last = number == len(loc) - 1
        if isinstance(values, dict) and (part in values or last):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part]
        else:
            if last:
                return tuple(key), True
            continue
        key.append(part)
    return tuple(key), False


def _at_tag(key: Key, detail: Mapping[str, Any]) -> Key:
    """A union's tag is told at the tag's own key."""
    return (*key, "kind") if detail["type"].startswith("union_tag") else key


def _problem(key: Key, details: list[Mapping[str, Any]], document: Document) -> UserError:
    kind, name = details[0]["type"], dotted(key)
    where = document.where(key if kind not in ("missing", "union_tag_not_found") else key[:-1])
    if kind == "extra_forbidden":
        fix = _nearest(str(key[-1]), known_keys(key[:-1], document.values))
        return UserError(f"{name}: unknown key", where=where, fix=fix)
    if kind == "missing":
        return UserError(f"{name} is missing", where=where, fix=_meaning(key, document.values))
    if kind == "union_tag_not_found":
        return UserError(f"{name} is missing", where=where, fix="one of full, lora, qlora")
    value = _value_at(key, document.values)
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    what = f"{name} must be {expected}, not {_shown(value)}"
    return UserError(what, where=where, fix=_hint(value, details))


def _expected(detail: Mapping[str, Any]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        options = _options(detail)
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if kind in _BOUNDS:
        name, form = _BOUNDS[kind]
        return form.format(f"{context[name]:g}")
    return _EXPECTED.get(kind) or str(detail["msg"]).lower()


def _options(detail: Mapping[str, Any]) -> list[str]:
    context = detail["ctx"]
    text = context.get("expected") or context.get("expected_tags")
    return str(text).replace(" or ", ", ").replace("'", "").split(", ")


def _hint(value: Any, details: list[Mapping[str, Any]]) -> str:
    if not isinstance(value, str):
        return ""
    if any(d["type"] in ("float_type", "int_type") for d in details) and _is_number(value):
        return "take the quotes away"
    tagged = [d for d in details if d["type"] in ("literal_error", "union_tag_invalid")]
    close = get_close_matches(value, [o for d in tagged for o in _options(d)], n=1)
    return f"did you mean {close[0]}?" if close else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def _value_at(key: Key, values: Any) -> Any:
    for part in key:
        holder: Any = values if isinstance(values, dict | list) else {part: None}
        values = holder[part]
    return values


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(names)}"


def known_keys(key: Key, values: Any) -> list[str]:
    """The keys that may stand in the group at `key` of a document."""
    fields: dict[str, None] = {}
    for group in _groups(Recipe, key, values):
        fields.update(dict.fromkeys(group.model_fields))
    return list(fields)


def _meaning(key: Key, values: Any) -> str:
    for group in _groups(Recipe, key[:-1], values):
        if (field := group.model_fields.get(str(key[-1]))) and field.description:
            return field.description
    return ""


def _groups(annotation: Any, key: Key, values: Any) -> list[type[BaseModel]]:
    """The groups of the schema that may stand at `key`; a union is settled by its `kind`."""
    if not key:
        models = [m for m in _models(annotation) if isinstance(m, type)]
        kind = values.get("kind") if isinstance(values, dict) else None
        fitting = [m for m in models if kind in _kinds(m)]
        return fitting or models
    inner = _value_at(key[:1], values)
    found: list[type[BaseModel]] = []
    for option in _groups(annotation, (), values) or _containers(annotation):
        child = _child(option, key[0])
        if child is not None:
            found += _groups(child, key[1:], inner)
    return found


def _child(option: Any, part: str | int) -> Any:
    if isinstance(option, type) and issubclass(option, BaseModel):
        field = option.model_fields.get(str(part))
        return field.annotation if field else None
    return get_args(option)[-1]  # list[X] or dict[str, X]


def _models(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []


def _containers(annotation: Any) -> list[Any]:
    return [annotation] if get_origin(annotation) in (list, dict) else []


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()
