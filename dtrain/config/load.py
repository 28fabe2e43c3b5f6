"""Load a recipe: read, override, validate, check; all errors are reported at once."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from dtrain.config.checks import check
from dtrain.config.clash import Clash
from dtrain.config.messages import problems
from dtrain.config.schema import Recipe
from dtrain.config.several_adapters import expand_adapters
from dtrain.config.yaml_document import (
    Key,
    YamlDocument,
    dotted,
    iter_texts,
    parse_value,
    read_document,
)
from dtrain.core.addresses import has_secret, secret_error, without_secret
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError, UserErrors, nearest_name
from dtrain.recipes import shipped


def load_recipe(address: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        address: a YAML file, the name of a shipped recipe, or the values of one.
        overrides: `key.sub=value`, each value in YAML.

    Raises:
        UserError: the file cannot be read.
        UserErrors: all errors in the recipe, each with `file:line`.
    """
    if isinstance(address, Mapping):
        document = YamlDocument("recipe", deepcopy(dict(address)))
    else:
        document = read_document(find_recipe(address))
    check_no_secrets(document, overrides)
    faults = apply_overrides(document, overrides)
    faults += expand_adapters(document)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        broken = problems(error, document)
        faults += [*broken.values(), *_clashes_without(broken, document)]
    else:
        faults += [_with_lines(clash, document) for clash in check(recipe)]
    if faults:
        raise UserErrors(faults)
    return recipe


def with_origins(
    errors: Sequence[UserError], address: str, overrides: Sequence[str] = ()
) -> list[UserError]:
    """Errors of checks after the loading, with `file:line` or the override before their keys.

    Args:
        errors: those that begin with a key, such as `stages.task.data: qa.jsonl:3`, get an origin.
        address, overrides: of the recipe, which `load_recipe` has read.
    """
    document = read_document(find_recipe(address))
    apply_overrides(document, overrides)
    return [
        UserError(e.message, where=_with_origin(e.where, document), fix=e.fix, status=e.status)
        for e in errors
    ]


def _with_origin(where: str, document: YamlDocument) -> str:
    holder: Any = document.values
    key: Key = ()
    with suppress(UserError, KeyError):
        for step in where.partition(":")[0].split("."):
            index = _index(holder, key, step, where)
            holder, key = holder[index], (*key, index)
    return f"{document.where(key)}: {where}" if key else where


def check_no_secrets(document: YamlDocument, overrides: Sequence[str] = ()) -> None:
    """Refuse addresses with a secret, before another message or a file can show them.

    Raises:
        UserErrors: each, with its key, and without the address.
    """
    texts = [(text, _location(document, key)) for key, text in iter_texts(document.values)]
    texts += [(text, f"override {without_secret(text.partition('=')[0])}") for text in overrides]
    if faults := [secret_error(where) for text, where in texts if has_secret(text)]:
        raise UserErrors(faults)


def _location(document: YamlDocument, key: Key) -> str:
    return f"{document.where(key)}: {dotted(key)}" if key else document.name


def find_recipe(address: str) -> Path:
    """The file of a recipe, or of a shipped recipe by name.

    Raises:
        UserError: there is no such recipe; the closest shipped one is proposed.
    """
    path, known = user_path(address), shipped()
    if path.is_file():
        return path
    if address in known:
        return known[address]
    if path.is_dir():
        raise UserError("is a folder, not a recipe", where=address)
    fix = nearest_name(path.stem, known, f"shipped recipes: {', '.join(known)}")
    raise UserError("there is no such recipe", where=without_secret(address), fix=fix)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with its defaults, in the order of the schema, without empty keys.

    `load_recipe` reads an equal recipe from it.
    """
    return to_yaml(recipe.model_dump(mode="python", exclude_none=True))


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    yaml = YAML(typ="rt", pure=True)
    yaml.width, yaml.allow_unicode, yaml.default_flow_style = 2**20, True, False
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(values, stream)
    return stream.getvalue()


def _with_lines(clash: Clash, document: YamlDocument) -> UserError:
    """The error with the line of each of its keys that the document contains."""
    origins = list(dict.fromkeys(document.where(key) for key in clash.keys))
    lines = [origin for origin in origins if origin != document.name] or origins
    return UserError(clash.message, where=", ".join(lines), fix=clash.fix)


def _clashes_without(broken: dict[Key, UserError], document: YamlDocument) -> list[UserError]:
    """Clashes among the valid keys: the recipe is checked without the broken ones."""
    valid = deepcopy(document.values)
    for key in sorted(broken, key=len, reverse=True):
        _remove(valid, key)
    try:
        recipe = Recipe.model_validate(valid)
    except ValidationError:
        return []  # a required key is broken
    return [
        _with_lines(clash, document)
        for clash in check(recipe)
        if not any(_overlap(key, bad) for key in clash.keys for bad in broken)
    ]


def _overlap(a: Key, b: Key) -> bool:
    length = min(len(a), len(b))
    return a[:length] == b[:length]


def _remove(values: Any, key: Key) -> None:
    for step in key[:-1]:
        values = values[step]
    if key and isinstance(values, dict):
        values.pop(key[-1], None)


_SYNTAX = "write key=value or group.key=value, for example engine.kind=zero3"


def apply_overrides(document: YamlDocument, overrides: Sequence[str]) -> list[UserError]:
    """Apply each `key=value` to the document, in order.

    Entries of a list are addressed by index (`stages.0.…`) or by name (`stages.domain.…`).

    Returns:
        An error for each override that cannot be applied.
    """
    problems = []
    for override in overrides:
        try:
            _apply(document, override)
        except UserError as problem:
            problems.append(problem)
    return problems


def _apply(document: YamlDocument, override: str) -> None:
    origin = f"override {override}"
    address, equals, text = override.partition("=")
    steps = address.strip().split(".")
    if not equals or not all(steps):
        raise UserError("is not of the form key=value", where=origin, fix=_SYNTAX)
    value = parse_value(text, origin)
    holder: Any = document.values
    key: Key = ()
    for step in steps[:-1]:
        holder, key = _enter(holder, key, step, origin)
        document.origins.setdefault(key, origin)
    last = _index(holder, key, steps[-1], origin)
    holder[last] = value
    _forget(document, (*key, last))
    document.origins[(*key, last)] = origin


def _enter(holder: Any, key: Key, step: str, origin: str) -> tuple[Any, Key]:
    index = _index(holder, key, step, origin)
    if isinstance(holder, dict) and holder.get(step) is None:
        holder[step] = {}
    return holder[index], (*key, index)


def _index(holder: Any, key: Key, step: str, origin: str) -> str | int:
    if isinstance(holder, dict):
        return step
    if not isinstance(holder, list):
        raise UserError(f"{dotted(key)} has no keys: it is {holder!r}", where=origin)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in holder]
    if step in names:
        return names.index(step)
    if step.isdecimal() and int(step) < len(holder):
        return int(step)
    known = [str(name) for name in names if name]
    fix = nearest_name(step, known, f"use one of {_choices(known, len(holder))}")
    raise UserError(f"{dotted(key)} has no entry {step}", where=origin, fix=fix)


def _choices(names: list[str], count: int) -> str:
    return ", ".join([*names, *(str(number) for number in range(count))]) or "none: it is empty"


def _forget(document: YamlDocument, key: Key) -> None:
    """Remove the lines of a value that was replaced."""
    for old in [k for k in document.origins if k[: len(key)] == key]:
        del document.origins[old]
