"""A recipe from its file: read, overridden, validated, checked; every fault told at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from dtrain.config.checks import Clash, check
from dtrain.config.messages import problems
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Document, Key, dotted, parse_value, read_document
from dtrain.core.errors import Problems, UserError
from dtrain.recipes import shipped


def load_recipe(address: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        address: a YAML file, or the name of a recipe that comes with dtrain.
        overrides: `key.sub=value`, each value in YAML.

    Raises:
        UserError: the file cannot be read.
        Problems: every fault in the recipe, with `file:line`.
    """
    document = read_document(find_recipe(address))
    faults = apply_overrides(document, overrides)
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        broken = problems(error, document)
        faults += [*broken.values(), *_clashes_beside(broken, document)]
    else:
        faults += [_placed(clash, document) for clash in check(recipe)]
    if faults:
        raise Problems(faults)
    return recipe


def find_recipe(address: str) -> Path:
    """The file that an address stands for.

    Raises:
        UserError: there is none; the nearest shipped recipe is offered.
    """
    path, known = Path(address).expanduser(), shipped()
    if path.is_file():
        return path
    if address in known:
        return known[address]
    if path.is_dir():
        raise UserError("is a folder, not a recipe", where=address)
    close = get_close_matches(path.stem, known, n=1)
    offer = f"did you mean {close[0]}?" if close else f"dtrain comes with: {', '.join(known)}"
    raise UserError("there is no such recipe", where=address, fix=offer)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, defaults filled in, in the order of the schema; keys not given are left.

    `load_recipe` reads it back equal.
    """
    yaml = YAML(typ="rt", pure=True)
    yaml.width, yaml.allow_unicode, yaml.default_flow_style = 2**20, True, False
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="python", exclude_none=True), stream)
    return stream.getvalue()


def _placed(clash: Clash, document: Document) -> UserError:
    """A clash between keys, with the line of each that is written somewhere."""
    places = list(dict.fromkeys(document.where(key) for key in clash.keys))
    written = [place for place in places if place != document.name] or places
    return UserError(clash.what, where=", ".join(written), fix=clash.fix)


def _clashes_beside(broken: dict[Key, UserError], document: Document) -> list[UserError]:
    """Clashes among the keys that are right, found by leaving out the broken ones."""
    healed = deepcopy(document.values)
    for key in sorted(broken, key=len, reverse=True):
        _leave_out(healed, key)
    try:
        recipe = Recipe.model_validate(healed)
    except ValidationError:
        return []  # what is broken cannot be left out
    return [
        _placed(clash, document)
        for clash in check(recipe)
        if not any(_overlap(key, bad) for key in clash.keys for bad in broken)
    ]


def _overlap(one: Key, other: Key) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]


def _leave_out(values: Any, key: Key) -> None:
    for part in key[:-1]:
        values = values[part]
    if key and isinstance(values, dict):
        values.pop(key[-1], None)


_FORM = "write key=value or group.key=value, for example engine.kind=zero3"


def apply_overrides(document: Document, overrides: Sequence[str]) -> list[UserError]:
    """Put each `key=value` into the document, in order; what cannot be put there is returned.

    A list is entered by number (`stages.0.…`) or by the name of an entry (`stages.domain.…`).
    """
    problems = []
    for override in overrides:
        try:
            _apply(document, override)
        except UserError as problem:
            problems.append(problem)
    return problems


def _apply(document: Document, override: str) -> None:
    origin = f"override {override}"
    address, equals, text = override.partition("=")
    parts = address.strip().split(".")
    if not equals or not all(parts):
        raise UserError("is not of the form key=value", where=origin, fix=_FORM)
    value = parse_value(text, origin)
    holder: Any = document.values
    key: Key = ()
    for part in parts[:-1]:
        holder, key = _enter(holder, key, part, origin)
        document.origins.setdefault(key, origin)
    last = _index(holder, key, parts[-1], origin)
    holder[last] = value
    _forget(document, (*key, last))
    document.origins[(*key, last)] = origin


def _enter(holder: Any, key: Key, part: str, origin: str) -> tuple[Any, Key]:
    index = _index(holder, key, part, origin)
    if isinstance(holder, dict) and holder.get(part) is None:
        holder[part] = {}
    return holder[index], (*key, index)


def _index(holder: Any, key: Key, part: str, origin: str) -> str | int:
    if isinstance(holder, dict):
        return part
    if not isinstance(holder, list):
        raise UserError(f"{dotted(key)} has no keys: it is {holder!r}", where=origin)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in holder]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(holder):
        return int(part)
    known = [str(name) for name in names if name]
    close = get_close_matches(part, known, n=1)
    fix = f"did you mean {close[0]}?" if close else f"take one of {_choices(known, len(holder))}"
    raise UserError(f"{dotted(key)} has no entry {part}", where=origin, fix=fix)


def _choices(names: list[str], count: int) -> str:
    return ", ".join([*names, *(str(number) for number in range(count))]) or "none: it is empty"


def _forget(document: Document, key: Key) -> None:
    """The lines of what was replaced say nothing any more."""
    for old in [k for k in document.origins if k[: len(key)] == key]:
        del document.origins[old]
