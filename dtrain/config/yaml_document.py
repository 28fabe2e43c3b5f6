"""Parse YAML into plain values and remember the line of each key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import TaggedScalar
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from dtrain.core.errors import UserError, first_line
from dtrain.core.files import read_text

Key = tuple[str | int, ...]  # path of a value: ("stages", 0, "name")

MAX_BYTES = 1 << 18  # a recipe has a few thousand
MARKS = ("\n", ",", ":", "[", "{", "- ", "? ")
MAX_MARKS = 10_000  # they are parsed in two seconds; a stage of a resolved recipe has 200
MAX_VALUES = 100_000  # a few lines of YAML aliases can expand to billions of values
MAX_DEPTH = 40
MAX_BRACKETS = 100  # open at once; some may be in texts
MAX_INTEGER = 1 << 63  # the tensors and files that get it hold no more
_STRING = "tag:yaml.org,2002:str"
_TEXT = re.compile("[^\\0\ud800-\udfff]*")


@dataclass
class YamlDocument:
    """A recipe as written.

    Attributes:
        name: the file, for messages.
        values: plain dicts, lists and scalars.
        origins: key → `file:line` or `override …`.
    """

    name: str
    values: Any
    origins: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """`file:line` or `override …` of a key, or of the innermost group around it."""
        for length in range(len(key), -1, -1):
            if origin := self.origins.get(key[:length]):
                return origin
        return self.name


def dotted(key: Key) -> str:
    """("stages", 0, "name") → 'stages.0.name'."""
    return ".".join(map(str, key))


def iter_texts(values: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """Every text of a document with its key; a name of a key comes with the group's key."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield key, str(name)
            yield from iter_texts(value, (*key, name))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from iter_texts(value, (*key, index))


def read_document(path: Path) -> YamlDocument:
    """Read a YAML file.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a group of keys.
    """
    values, origins = deepcopy(_parse(read_text(path, MAX_BYTES), str(path)))
    if values is None:
        raise UserError("is empty", where=str(path), fix="start from `dtrain recipes copy tiny`")
    if not isinstance(values, dict):
        raise UserError("is not a group of `key: value` lines", where=str(path))
    return YamlDocument(str(path), values, origins)


def parse_value(text: str, name: str) -> Any:
    """Parse YAML into plain Python values; `name` is its origin, for messages."""
    return deepcopy(_parse(text, name)[0])


@lru_cache(maxsize=64)  # a recipe takes 30 ms, and is read again for each model card of its run
def _parse(text: str, name: str) -> tuple[Any, dict[Key, str]]:
    _check_size(text, name)
    reader = _Plain(name)
    try:
        return reader.convert(YAML(typ="rt", pure=True).load(text), ()), reader.origins
    except UserError:
        raise
    except MarkedYAMLError as error:
        raise _syntax_error(error, name) from error
    except RecursionError as error:
        raise UserError("is nested too deeply", where=name) from error
    except Exception as error:  # ruamel raises anything on tags and merge keys that are wrong
        raise UserError(f"is not valid YAML: {first_line(error)}", where=name) from error


def _check_size(text: str, name: str) -> None:
    """Check that ruamel can parse a text soon: its time grows with the square of some depths."""
    brackets = re.findall(r"[\[\]{}]", text)
    depths = accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    if len(text) > MAX_BYTES or sum(map(text.count, MARKS)) > MAX_MARKS:
        raise UserError("is too large for a recipe", where=name, fix="move data into data files")
    if max(depths, default=0) > MAX_BRACKETS:
        raise UserError("is nested too deeply", where=name)


def _syntax_error(error: MarkedYAMLError, name: str) -> UserError:
    position = error.problem_mark or error.context_mark
    where = f"{name}:{position.line + 1}" if position else name
    problem = str(error.problem or error.context)
    if isinstance(error, DuplicateKeyError):
        key = problem.partition('duplicate key "')[2].partition('"')[0]
        return UserError(f"{key}: duplicate key", where=where, fix="keep one of them")
    if "'\\t'" in problem:
        return UserError("indented with a tab", where=where, fix="YAML allows only spaces")
    if "expected a single document" in f"{error.context} {problem}":
        return UserError(
            "a second document starts here", where=where, fix="write one recipe per file"
        )
    return UserError(f"is not valid YAML: {problem}", where=where, fix=_syntax_fix(error))


def _syntax_fix(error: MarkedYAMLError) -> str:
    """Where to look: the reader notices an open bracket or a wrong indentation only further on."""
    if "mapping values" in str(error.problem):
        return "write `key: value`, with a space after the colon, also in the line above"
    if error.context_mark is None:
        return ""
    line, context = error.context_mark.line + 1, str(error.context)
    if "simple key" in context:
        return f"write `key: value`, with a space after the colon, in line {line}"
    if "flow" in context:
        return f"look at the brackets and commas from line {line} on"
    if "block" in context:
        return f"indent entries of one list or group alike; this one begins in line {line}"
    return ""


class _Plain:
    """Converts ruamel's values into plain ones and records the line of each key."""

    def __init__(self, name: str) -> None:
        self.name, self._count = name, 0
        self.origins: dict[Key, str] = {}

    def convert(self, node: Any, key: Key) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or len(key) > MAX_DEPTH:
            raise UserError("has too many values, or circular aliases", where=self.name)
        if isinstance(node, Mapping):
            return {str(k): self._child(node, k, (*key, str(k))) for k in node}
        if isinstance(node, Sequence) and not isinstance(node, str | bytes):
            return [self._child(node, i, (*key, i)) for i in range(len(node))]
        return _scalar(node, self.origins.get(key, self.name))

    def _child(self, node: Any, name: Any, key: Key) -> Any:
        line = _line(node, name)
        if line is not None:
            self.origins[key] = f"{self.name}:{line}"
        return self.convert(node[name], key)


def _line(node: Any, name: Any) -> int | None:
    position = node.lc.key if hasattr(node, "keys") else node.lc.item
    try:
        return int(position(name)[0]) + 1
    except (KeyError, TypeError, IndexError):
        return None  # from a YAML merge key; the group around it has a line


def _scalar(node: Any, where: str) -> Any:
    if isinstance(node, bool | ScalarBoolean):  # `&anchor true` is an int
        return bool(node)
    for kind in (int, float):
        if isinstance(node, kind):
            if abs(node) >= MAX_INTEGER and kind is int:
                raise UserError("a number is too large", where=where)
            return kind(node)
    if node is None or isinstance(node, date):  # datetime is a date
        return None if node is None else str(node)
    if isinstance(node, TaggedScalar) and node.tag.value in ("!!str", _STRING):
        node = node.value
    if not isinstance(node, str):
        raise UserError("a value with a tag such as !!binary is not read", where=where)
    if not _TEXT.fullmatch(node):  # in no file name, and half a character in no file
        raise UserError("a text contains NUL or half of a surrogate pair", where=where)
    return str(node)
