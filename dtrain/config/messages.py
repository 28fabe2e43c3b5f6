"""Validation errors of a recipe in plain English, one per key, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_origin

from pydantic import ValidationError

from dtrain.config import foreign_keys
from dtrain.config.methods import TRAITS
from dtrain.config.schema_paths import groups_at, key_owners, kinds_with, path_of, value_at
from dtrain.config.yaml_document import Key, YamlDocument, dotted
from dtrain.core.errors import UserError, nearest_name

_MAX_VALUE = 60
_KEY_ITSELF = "[key]"  # the last step of pydantic's `loc` for a key of a dict

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
}

_BOUNDS = {
    "greater_than": ("gt", "more than {}"),
    "greater_than_equal": ("ge", "at least {}"),
    "less_than": ("lt", "less than {}"),
    "less_than_equal": ("le", "at most {}"),
}


def problems(error: ValidationError, document: YamlDocument) -> dict[Key, UserError]:
    """Translate pydantic's errors.

    Args:
        error: of `Recipe.model_validate`.
        document: the recipe that was validated.

    Returns:
        Key → error with its file and line, in the order of the document.
    """
    by_key: dict[Key, list[Mapping[str, Any]]] = {}
    names = set[Key]()  # keys of a table that are wrong themselves, whatever their values
    branches: set[Key] = set()
    for detail in error.errors():
        is_missing = detail["type"] == "missing"
        key, is_branch = _document_key(detail["loc"], document.values, is_missing)
        is_name = detail["loc"][-1:] == (_KEY_ITSELF,)
        if is_name and detail["type"] == "literal_error":
            names.add(key)
        if detail["type"].startswith("union_tag"):
            key = (*key, "kind")
        by_key.setdefault(key, []).append(detail)
        if is_branch and not is_name:
            branches.add(key)
    # Errors in a list's entries are reported there, not again as "must be all-linear".
    redundant = {b for b in branches if any(k[: len(b)] == b and k != b for k in by_key)}
    return {
        key: _wrong_name(key, details, document)
        if key in names
        else _problem(key, details, document)
        for key, details in by_key.items()
        if key not in redundant
    }


def _document_key(loc: tuple[str | int, ...], values: Any, is_missing: bool) -> tuple[Key, bool]:
    """The key in the document: `loc` without the names of union branches that pydantic adds.

    Args:
        is_missing: the last entry of `loc` is a key that the document lacks.

    Returns:
        The key, and whether the last entry of `loc` was such a branch.
    """
    key: list[str | int] = []
    for index, step in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(values, dict) and (step in values or (is_last and is_missing)):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int):
            values = values[step]
        else:
            if is_last:
                return tuple(key), True
            continue
        key.append(step)
    return tuple(key), False


def _wrong_name(key: Key, details: list[Mapping[str, Any]], document: YamlDocument) -> UserError:
    """The error of a key in a table such as `data.columns`, whose keys dtrain defines."""
    name, value = str(key[-1]), value_at(key, document.values)
    known = [option for d in details if d["type"] == "literal_error" for option in _options(d)]
    fix = nearest_name(name, known, f"known here: {', '.join(known)}")
    if glued := _with_space(name, known):
        fix = glued
    elif value in known:
        fix = f"dtrain's name stands first: {{{value}: {name}}}"
    return UserError(f"{dotted(key)}: unknown name", where=document.where(key), fix=fix)


def _problem(key: Key, details: list[Mapping[str, Any]], document: YamlDocument) -> UserError:
    kind, name = details[0]["type"], dotted(key)
    where = document.where(key if kind not in ("missing", "union_tag_not_found") else key[:-1])
    if kind == "value_error":
        return UserError(f"{name}: {details[0]['ctx']['error']}", where=where)
    if kind == "extra_forbidden":
        if kinds := kinds_with(key, document.values):
            own, others = value_at((*key[:-1], "kind"), document.values), " or ".join(kinds)
            fix = f"remove it, or kind={others}"
            if key[-1] == "quantize" and own in TRAITS and not TRAITS[own].quantizes_base:
                fix = f"kind={TRAITS[own].quantized_kind}"
            return UserError(f"{name}: {own} has no {key[-1]}", where=where, fix=fix)
        fix = _replacement(key, document.values)
        return UserError(f"{name}: unknown key", where=where, fix=fix)
    if kind == "missing":
        return UserError(f"{name} is missing", where=where, fix=_meaning(key, document.values))
    if kind == "union_tag_not_found":
        return UserError(f"{name} is missing", where=where, fix=f"one of {', '.join(TRAITS)}")
    is_name = details[0]["loc"][-1:] == (_KEY_ITSELF,)
    value = key[-1] if is_name else value_at(key, document.values)
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    message = f"{name} must be {expected}, not {_shown(value)}"
    return UserError(message, where=where, fix=_hint(key, document.values, details))


def _replacement(key: Key, values: Any) -> str:
    """What to write instead of an unknown key."""
    name, groups = str(key[-1]), groups_at(key[:-1], values)
    if glued := _with_space(name, [known for group in groups for known in group.model_fields]):
        return glued
    if sentence := foreign_keys.answer(name):
        return sentence
    if path := foreign_keys.equivalent(name) or path_of(name):
        owner = key_owners()[path]
        is_here = any(issubclass(group, owner) for group in groups)
        return f"use {path.rpartition('.')[2] if is_here else path}"
    known = list(dict.fromkeys(known for group in groups for known in group.model_fields))
    return nearest_name(name, known, f"known here: {', '.join(known)}")


def _with_space(name: str, known: Iterable[str]) -> str:
    """How to write `steps:6`, which YAML reads as one word; empty if that is not the fault."""
    head, colon, value = name.partition(":")
    is_glued = bool(colon) and not value.startswith(" ") and head in known
    return f"write `{head}: {value}`, with a space after the colon" if is_glued else ""


def _expected(detail: Mapping[str, Any]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("literal_error", "union_tag_invalid"):
        options = _options(detail)
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if kind in _BOUNDS:
        name, phrase = _BOUNDS[kind]
        return phrase.format(f"{context[name]:g}")
    if kind == "string_too_long":
        return f"a text of at most {context['max_length']} characters"
    if kind == "too_short":
        group = "group of keys" if context["field_type"] == "Dictionary" else "list"
        return f"a {group} with at least one entry"
    return _EXPECTED.get(kind) or str(detail["msg"]).lower()


def _options(detail: Mapping[str, Any]) -> list[str]:
    context = detail["ctx"]
    text = context.get("expected") or context.get("expected_tags")
    return str(text).replace(" or ", ", ").replace("'", "").split(", ")


def _hint(key: Key, values: Any, details: list[Mapping[str, Any]]) -> str:
    value = value_at(key, values)
    if not isinstance(value, str):
        return ""
    if any(d["type"] in ("model_type", "model_attributes_type") for d in details):
        return _as_group(key, value, values)
    if any(d["type"] in ("float_type", "int_type") for d in details) and _is_number(value):
        return "remove the quotes"
    tagged = [d for d in details if d["type"] in ("literal_error", "union_tag_invalid")]
    return nearest_name(value, [o for d in tagged for o in _options(d)])


def _as_group(key: Key, value: str, values: Any) -> str:
    """How to write a text that stands in place of a group with one required key."""
    for group in groups_at(key, values):
        required = [name for name, field in group.model_fields.items() if field.is_required()]
        if glued := _with_space(value, required):
            return glued
        if len(required) == 1:
            is_list = get_origin(group.model_fields[required[0]].annotation) is list
            return f"write {key[-1]}: {{{required[0]}: {f'[{value}]' if is_list else value}}}"
    return ""


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
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"


def _meaning(key: Key, values: Any) -> str:
    for group in groups_at(key[:-1], values):
        if (field := group.model_fields.get(str(key[-1]))) and field.description:
            return field.description
    return ""
