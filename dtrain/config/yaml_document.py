"""YAML text into plain values, with the place each one came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from dtrain.core.errors import UserError
from dtrain.core.files import read_text

Key = tuple[str | int, ...]  # the way to a value: ("stages", 0, "name")

MOST_VALUES = 100_000  # a few lines of YAML aliases can stand for billions
DEEPEST = 40


@dataclass
class Document:
    """A recipe as read: plain values, and where each was written."""

    name: str
    values: Any
    origins: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """`file:line` or `override …` of a key, or of the nearest group around it."""
        for length in range(len(key), -1, -1):
            if origin := self.origins.get(key[:length]):
                return origin
        return self.name


def dotted(key: Key) -> str:
    """("stages", 0, "name") → 'stages.0.name'."""
    return ".".join(str(part) for part in key)


def read_document(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        UserError: it cannot be read, is not YAML, or is not a group of keys.
    """
    values, origins = _parse(read_text(path), str(path))
    if values is None:
        raise UserError("is empty", where=str(path), fix="`dtrain recipes copy tiny` gives a start")
    if not isinstance(values, dict):
        raise UserError("is not a group of `key: value` lines", where=str(path))
    return Document(str(path), values, origins)


def parse_value(text: str, name: str) -> Any:
    """The value that a piece of YAML stands for, as plain Python; `name` is for messages."""
    return _parse(text, name)[0]


def _parse(text: str, name: str) -> tuple[Any, dict[Key, str]]:
    yaml = YAML(typ="rt", pure=True)
    try:
        node = yaml.load(text)
    except MarkedYAMLError as error:
        raise _syntax_error(error, name) from error
    except (YAMLError, ValueError) as error:
        raise UserError(f"is not valid YAML: {_first_line(error)}", where=name) from error
    except RecursionError as error:
        raise UserError("is nested too deeply", where=name) from error
    reader = _Plain(name)
    return reader.convert(node, ()), reader.origins


def _syntax_error(error: MarkedYAMLError, name: str) -> UserError:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    problem = str(error.problem or error.context)
    if isinstance(error, DuplicateKeyError):
        key = problem.partition('duplicate key "')[2].partition('"')[0]
        return UserError(f"{key}: the key is there twice", where=where, fix="keep one of them")
    if "'\\t'" in problem:
        return UserError("a tab", where=where, fix="indent with spaces: YAML takes no tabs")
    if "expected a single document" in f"{error.context} {problem}":
        return UserError("a second document starts here", where=where, fix="one recipe a file")
    return UserError(f"is not valid YAML: {problem}", where=where)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Plain:
    """Turns ruamel's values into plain ones and remembers the line of each key."""

    def __init__(self, name: str) -> None:
        self.name, self._count = name, 0
        self.origins: dict[Key, str] = {}

    def convert(self, node: Any, key: Key) -> Any:
        self._count += 1
        if self._count > MOST_VALUES or len(key) > DEEPEST:
            raise UserError("has too many values, or aliases that go round", where=self.name)
        if isinstance(node, Mapping):
            return {str(k): self._child(node, k, (*key, str(k))) for k in node}
        if isinstance(node, Sequence) and not isinstance(node, str):
            return [self._child(node, i, (*key, i)) for i in range(len(node))]
        return _scalar(node)

    def _child(self, node: Any, name: Any, key: Key) -> Any:
        line = _line(node, name)
        if line is not None:
            self.origins[key] = f"{self.name}:{line}"
        return self.convert(node[name], key)


def _line(node: Any, name: Any) -> int | None:
    place = node.lc.key if hasattr(node, "keys") else node.lc.item
    try:
        return int(place(name)[0]) + 1
    except (KeyError, TypeError, IndexError):
        return None  # came in through a YAML merge key: the group around it has a line


def _scalar(node: Any) -> Any:
    if isinstance(node, bool | ScalarBoolean):  # the second, of `&anchor true`, is an int
        return bool(node)
    for kind in (int, float):
        if isinstance(node, kind):
            return kind(node)
    return None if node is None else str(node)
