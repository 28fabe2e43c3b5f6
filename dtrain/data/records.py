"""Rows of a source as texts or conversations, every fault with its file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from dtrain.core.errors import EmptyDataError, UserError
from dtrain.data.formats import (
    ROW_FORMATS,
    Messages,
    Preference,
    RowContent,
    convert,
    detect_format,
)
from dtrain.data.readers import Raw, rows
from dtrain.data.sources import SourceFile

__all__ = ["BadRecord", "Messages", "Preference", "Record", "detect", "iter_records", "read"]


@dataclass(frozen=True)
class Record:
    """One row: a text, a conversation or a pair of them, and its number in its part, from 1."""

    value: RowContent
    file_index: int
    row_number: int


@dataclass(frozen=True)
class BadRecord:
    """A row that cannot be used; or a part, from this row on."""

    error: UserError
    file_index: int
    row_number: int


def read(
    parts: list[SourceFile], form: str, columns: Mapping[Any, str] | None = None
) -> Iterator[Record]:
    """All rows of all parts, in order.

    Args:
        parts: of one source.
        form: a format of the recipe.
        columns: what a column of the format is called in the files, where it is called otherwise.

    Raises:
        UserError: a row cannot be used, with its file and line.
    """
    for item in iter_records(parts, form, columns):
        if isinstance(item, BadRecord):
            raise item.error
        yield item


def iter_records(
    parts: list[SourceFile], form: str, columns: Mapping[Any, str] | None = None
) -> Iterator[Record | BadRecord]:
    """As `read`, but a row that cannot be used is a fault, and reading goes on behind it."""
    columns = columns or {}
    if form == "auto" and parts:
        try:
            form = detect(parts, columns)
        except EmptyDataError:
            return
    for index, part in enumerate(parts):
        number = 0
        try:
            _check_kind(part, form)
            for number, parse in rows(part, _wanted(form, columns)):
                yield _record(parse(), form, columns, index, number, part)
        except UserError as error:  # nothing more can be read of this part
            yield BadRecord(error, index, number + 1)


def _record(
    raw: object, form: str, columns: Mapping[Any, str], index: int, number: int, part: SourceFile
) -> Record | BadRecord:
    place = part.location(number)
    if isinstance(raw, UserError):
        return BadRecord(_placed(raw, place), index, number)
    try:
        return Record(convert(raw, form, columns, place), index, number)
    except UserError as error:
        return BadRecord(error, index, number)


def _placed(error: UserError, place: str) -> UserError:
    return error if error.where else UserError(error.message, where=place, fix=error.fix)


class RecordReader:
    """Stretches of a source; those in ascending order are read in one pass over its files."""

    def __init__(self, parts: list[SourceFile], form: str, columns: Mapping[Any, str]) -> None:
        self.parts, self.form, self.columns = parts, form, columns
        self._part, self._read, self._rows = -1, 0, cast(Iterator[Raw], iter(()))

    def records(self, part: int, skip: int, count: int) -> Iterator[Record]:
        """`count` rows, over the edges of parts, from row `skip` (from 0) of a part on.

        Raises:
            UserError: there are not as many, or one cannot be used.
        """
        if part != self._part or skip < self._read:
            self._open(part)
        for _ in range(skip - self._read):
            self._next()  # not parsed
        for _ in range(count):
            number, parse = self._next()
            item = _record(
                parse(), self.form, self.columns, self._part, number, self.parts[self._part]
            )
            if isinstance(item, BadRecord):
                raise item.error
            yield item

    def _open(self, part: int) -> None:
        self._part, self._read = part, 0
        self._rows = (
            rows(self.parts[part], _wanted(self.form, self.columns)) if part >= 0 else iter(())
        )

    def _next(self) -> Raw:
        while (found := next(self._rows, None)) is None:
            if self._part + 1 == len(self.parts):
                what, fix = "there are fewer rows than a moment ago", "leave the files as they are"
                raise UserError(what, where=self.parts[-1].name, fix=fix)
            self._open(self._part + 1)
        self._read += 1
        return found


def detect(parts: list[SourceFile], columns: Mapping[Any, str]) -> str:
    """The format that the first row shows.

    Raises:
        EmptyDataError: there is no row.
        UserError: no format has such columns, or nothing can be read.
    """
    first_fault: UserError | None = None
    for part in parts:
        if part.kind.startswith(".txt"):
            return "text"
        try:
            for number, parse in rows(part, renamed=columns.values()):
                raw = parse()
                if not isinstance(raw, UserError):
                    return detect_format(raw, columns, part.location(number))
                first_fault = first_fault or _placed(raw, part.location(number))
        except UserError as error:
            first_fault = first_fault or error
    if first_fault:
        raise first_fault
    raise EmptyDataError("there is no row in it", where=parts[0].name, fix="correct `path`")


def _check_kind(part: SourceFile, form: str) -> None:
    if part.kind.startswith(".txt") and form != "text":
        what = f"a {part.kind} file holds a text, not rows of {form}"
        raise UserError(what, where=part.name, fix="format: text")


def _wanted(form: str, columns: Mapping[Any, str]) -> tuple[str, ...]:
    known = ROW_FORMATS[form]
    return tuple(columns.get(name, name) for name in (*known.needs, *known.takes))
