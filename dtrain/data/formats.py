"""Rows of a source as texts or conversations, every fault with its file and line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dtrain.core.errors import UserError
from dtrain.data.sources import Part

Messages = list[dict[str, Any]]

BATCH_ROWS = 1000
COLUMNS = {
    "text": ("text",),
    "alpaca": ("instruction", "output", "input"),
    "messages": ("messages",),
}
OPTIONAL = {"input"}


@dataclass(frozen=True)
class Record:
    """One row: a text or a conversation, and its number in its part, from 1."""

    value: str | Messages
    part: int
    number: int


def read(parts: list[Part], form: str) -> Iterator[Record]:
    """All rows of all parts, in order.

    Args:
        parts: of one source.
        form: text, alpaca or messages.

    Raises:
        UserError: a row cannot be used, with its file and line.
    """
    for index, part in enumerate(parts):
        for number, row in _rows(part, form):
            yield Record(_value(row, form, part.place(number)), index, number)


def _rows(part: Part, form: str) -> Iterator[tuple[int, Any]]:
    if part.rows is not None:
        return _dataset(part, form)
    readers = {".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    return readers[part.kind](part, form)


def _txt(part: Part, form: str) -> Iterator[tuple[int, Any]]:
    if form != "text":
        raise UserError(
            f"a .txt file holds a text, not rows of {form}", where=part.name, fix="format: text"
        )
    content = _content(part)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8: byte {error.start}", where=part.name, fix="convert the file to UTF-8"
        ) from error
    if text:
        yield 1, {"text": text}


def _content(part: Part) -> bytes:
    assert part.path is not None
    return part.path.read_bytes()


def _jsonl(part: Part, form: str) -> Iterator[tuple[int, Any]]:
    assert part.path is not None
    with open(part.path, "rb") as file:
        yield from _lines(file, part)


def _lines(file: io.BufferedReader | io.BytesIO, part: Part) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, _parse(line, part, number)


def _parse(line: bytes, part: Part, first_line: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{part.name}:{first_line + error.lineno - 1}"
        what = f"broken JSON: {error.msg} (column {error.colno})"
        raise UserError(what, where=where, fix="mend or remove the line") from error
    except UnicodeDecodeError as error:
        where = f"{part.name}:{first_line + line[: error.start].count(10)}"
        raise UserError("not UTF-8", where=where, fix="convert the file to UTF-8") from error
    except RecursionError as error:
        where = f"{part.name}:{first_line}"
        raise UserError("JSON nested too deeply", where=where) from error


def _json(part: Part, form: str) -> Iterator[tuple[int, Any]]:
    """A list of rows; or one row a line, as some call .json what is .jsonl."""
    content = _content(part)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return enumerate(_parse(content, part, 1), start=1)
    return _lines(io.BytesIO(content), part)


def _parquet(part: Part, form: str) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(part.path) as file:
            columns = _columns(file.schema_arrow.names, form, part)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"broken parquet: {reason}", where=part.place(number + 1)) from error


def _dataset(part: Part, form: str) -> Iterator[tuple[int, Any]]:
    assert part.rows is not None
    rows = part.rows.select_columns(_columns(part.rows.column_names, form, part))
    return enumerate(rows, start=1)


def _columns(names: list[str], form: str, part: Part) -> list[str]:
    for column in COLUMNS[form]:
        if column not in names and column not in OPTIONAL:
            raise _missing(column, names, form, part.name)
    return [column for column in COLUMNS[form] if column in names]


def _missing(column: str, names: list[str], form: str, where: str) -> UserError:
    return UserError(
        f"column `{column}` is missing; there is {', '.join(map(str, names)) or 'nothing'}",
        where=where,
        fix=f"format: {form} needs {', '.join(c for c in COLUMNS[form] if c not in OPTIONAL)}",
    )


def _value(row: Any, form: str, where: str) -> str | Messages:
    if not isinstance(row, dict):
        raise UserError(f"a row must be an object, not {_kind(row)}", where=where)
    for column in COLUMNS[form]:
        if column not in row and column not in OPTIONAL:
            raise _missing(column, list(row), form, where)
    if form == "text":
        return _text(row["text"], "text", where)
    return _alpaca(row, where) if form == "alpaca" else _messages(row["messages"], where)


def _alpaca(row: dict[str, Any], where: str) -> Messages:
    """One exchange; templates that know them see `instruction` and `input` apart as well."""
    instruction = _text(row["instruction"], "instruction", where)
    extra = _text(row.get("input") or "", "input", where)
    content = f"{instruction}\n\n{extra}" if extra else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": extra}
    return [user, {"role": "assistant", "content": _text(row["output"], "output", where)}]


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else _kind(value)
        raise UserError(f"`messages` must be a list of messages, not {what}", where=where)
    for number, message in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise UserError(f"`{name}` must be an object, not {_kind(message)}", where=where)
        for field in ("role", "content"):
            if field not in message:
                raise UserError(f"`{name}` has no `{field}`", where=where)
            _text(message[field], f"{name}.{field}", where)
    return value


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"`{name}` must be a text, not {_kind(value)}", where=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character; no tokenizer takes it
        what = f"`{name}` holds half a character at place {error.start}"
        raise UserError(what, where=where, fix="mend or remove the row") from error
    return value


def _kind(value: Any) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", str: "a text", bool: "a bool"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "this")
