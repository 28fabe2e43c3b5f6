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
from dtrain.config.overrides import apply_overrides
from dtrain.config.schema import Recipe
from dtrain.config.source import Document, Key, read_document
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
