"""`key.sub=value` from the command line, put into a recipe that was read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from dtrain.config.source import Document, Key, dotted, parse_value
from dtrain.core.errors import UserError

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
