"""The schema as a tree: which group of keys stands where, and where each key belongs."""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Key


def subgroups(annotation: Any) -> list[tuple[type[BaseModel], str]]:
    """The groups inside an annotation, each with what its path gets.

    Returns:
        (group, suffix) pairs; the suffix is `[]` for a list, `.NAME` for a dict, else empty.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, "")]
    kind, arguments = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return subgroups(arguments[0])
    if kind in (list, dict):
        suffix = "[]" if kind is list else ".NAME"
        return [(group, suffix + inner) for group, inner in subgroups(arguments[-1])]
    if kind in (Union, types.UnionType):
        return [pair for option in arguments for pair in subgroups(option)]
    return []


@cache
def key_owners() -> dict[str, type[BaseModel]]:
    """Path of every key, such as `stages[].train.steps` → the group that defines it.

    A key that a group inherits is listed only at the group that defines it.
    """
    owners: dict[str, type[BaseModel]] = {}
    for path, owner in _walk(Recipe, "", set()):
        owners.setdefault(path, owner)
    return owners


def _walk(
    group: type[BaseModel], path: str, visited: set[type[BaseModel]]
) -> Iterator[tuple[str, type[BaseModel]]]:
    inherited = {key for other in visited if issubclass(group, other) for key in other.model_fields}
    visited.add(group)
    for name, field in group.model_fields.items():
        if name not in inherited:
            here = f"{path}.{name}" if path else name
            yield here, group
            for inner, suffix in subgroups(field.annotation):
                yield from _walk(inner, here + suffix, visited)


def path_of(key: str) -> str:
    """The path of a key that stands in the wrong group; empty if it is in no group, or in several.

    Of two groups, one in the other, the outer one counts.
    """
    paths = [path for path in key_owners() if path.rpartition(".")[2] == key]
    depth = min((path.count(".") for path in paths), default=0)
    outer = [path for path in paths if path.count(".") == depth]
    return outer[0] if len(outer) == 1 else ""


def groups_at(key: Key, values: Any, annotation: Any = Recipe) -> list[type[BaseModel]]:
    """The groups of the schema that fit at a key of a document.

    Where several groups are allowed, `kind` in the document decides.

    Args:
        key: from `annotation` on; it exists in the document.
        values: what the document contains there.
        annotation: type of those values.
    """
    options = []
    for group, suffix in subgroups(annotation):
        depth = suffix.count("[]") + suffix.count(".NAME")
        if depth <= len(key):
            options.append((group, key[depth:], value_at(key[:depth], values)))
    groups: list[type[BaseModel]] = []
    for group, rest, inner in [option for option in options if _has_kind(*option)] or options:
        if not rest:
            groups.append(group)
        elif field := group.model_fields.get(str(rest[0])):
            groups += groups_at(rest[1:], value_at(rest[:1], inner), field.annotation)
    return groups


def kinds_with(key: Key, values: Any) -> list[str]:
    """The kinds of a group that have a key which the group's own kind lacks.

    Args:
        key: in a document with these values.
    """
    holders = groups_at(key[:-2], values) if len(key) > 1 else []
    fields = [holder.model_fields.get(str(key[-2])) for holder in holders]
    groups = [group for field in fields if field for group, _ in subgroups(field.annotation)]
    with_key = [g for g in groups if key[-1] in g.model_fields and "kind" in g.model_fields]
    return [kind for g in with_key for kind in get_args(g.model_fields["kind"].annotation)]


def _has_kind(group: type[BaseModel], _: Key, values: Any) -> bool:
    kind = group.model_fields.get("kind")
    if kind is None or get_origin(kind.annotation) is not Literal or not isinstance(values, dict):
        return False
    return values.get("kind") in get_args(kind.annotation)


def value_at(key: Key, values: Any) -> Any:
    """The value at a key of a document; None where a key stands in for a group."""
    for step in key:
        container: Any = values if isinstance(values, dict | list) else {step: None}
        values = container[step]
    return values
