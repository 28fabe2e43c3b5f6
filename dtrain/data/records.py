"""Rows of a source as texts, conversations or preferences; each error has its file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from dtrain.config.data import Source
from dtrain.core.cache_paths import store_folder
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.log import say
from dtrain.data.formats import (
    ORIGIN,
    ROW_FORMATS,
    RowContent,
    convert_row,
    detect_format,
    unread_columns,
)
from dtrain.data.readers import iter_rows
from dtrain.data.sources import RawRow, SourceFile, count_by_type, find_source_files


@dataclass(frozen=True)
class Record:
    """A row: its content, the index of its file in the source, and its number there, from 1.

    Attributes:
        unread: names of its columns that the format does not read.
        origin: where it comes from, if it says so.
    """

    value: RowContent
    file_index: int
    row_number: int
    unread: tuple[str, ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class BadRecord:
    """A row that cannot be used, or the rest of a file from this row."""

    error: UserError
    file_index: int
    row_number: int


def read_records(
    source_files: list[SourceFile], row_format: str, columns: Mapping[Any, str] | None = None
) -> Iterator[Record]:
    """All rows of all files of a source, in order.

    Args:
        source_files: of one source.
        row_format: `format` in the recipe.
        columns: the format's name of a column → its name in the files, where they differ.

    Raises:
        UserError: a row cannot be used, with its file and line.
    """
    for record in iter_records(source_files, row_format, columns):
        if isinstance(record, BadRecord):
            raise record.error
        yield record


def iter_records(
    source_files: list[SourceFile], row_format: str, columns: Mapping[Any, str] | None = None
) -> Iterator[Record | BadRecord]:
    """Like `read_records`, but yields a BadRecord for a row that cannot be used, and continues."""
    columns = columns or {}
    if row_format == "auto" and source_files:
        try:
            row_format = detect_source_format(source_files, columns)
        except EmptyDataError:
            return
    for index, source_file in enumerate(source_files):
        number = 0
        try:
            _check_file_kind(source_file, row_format)
            for number, parse in iter_rows(source_file, _columns_of(row_format, columns)):
                yield _record(parse(), row_format, columns, (index, number), source_file)
        except UserError as error:  # the rest of this file cannot be read
            yield BadRecord(error, index, number + 1)


def _record(
    raw: object,
    row_format: str,
    columns: Mapping[Any, str],
    position: tuple[int, int],
    source_file: SourceFile,
) -> Record | BadRecord:
    location = source_file.location(position[1])
    columns = {} if source_file.is_prose else columns  # a file of plain text has no columns
    if isinstance(raw, UserError):
        return BadRecord(_with_location(raw, location), *position)
    try:
        value = convert_row(raw, row_format, columns, location)
        unread = unread_columns(raw, row_format, columns)
        return Record(value, *position, unread, _origin(raw))
    except UserError as error:
        return BadRecord(error, *position)


def _origin(raw: Any) -> str:
    origin = raw.get(ORIGIN)
    return origin if isinstance(origin, str) else ""


def _with_location(error: UserError, location: str) -> UserError:
    return error if error.where else UserError(error.message, where=location, fix=error.fix)


class RecordReader:
    """Reads ranges of a source's rows; ranges in ascending order take one pass over the files."""

    def __init__(
        self, source_files: list[SourceFile], row_format: str, columns: Mapping[Any, str]
    ) -> None:
        self.source_files, self.row_format, self.columns = source_files, row_format, columns
        self._file, self._rows_read = -1, 0
        self._rows = cast(Iterator[RawRow], iter(()))

    def records(self, file_index: int, skip: int, count: int) -> Iterator[Record]:
        """Read `count` rows, continuing in the next files.

        Args:
            file_index: of the file that contains the first row.
            skip: rows of that file before the first one.
            count: rows to read.

        Raises:
            UserError: there are fewer rows, or one cannot be used.
        """
        if file_index != self._file or skip < self._rows_read:
            self._open(file_index)
        for _ in range(skip - self._rows_read):
            self._next()  # skipped rows are not parsed
        for _ in range(count):
            number, parse = self._next()
            source_file = self.source_files[self._file]
            position = self._file, number
            record = _record(parse(), self.row_format, self.columns, position, source_file)
            if isinstance(record, BadRecord):
                raise record.error
            yield record

    def _open(self, file_index: int) -> None:
        self._file, self._rows_read = file_index, 0
        if file_index >= 0:
            columns = _columns_of(self.row_format, self.columns)
            self._rows = iter_rows(self.source_files[file_index], columns)
        else:
            self._rows = cast(Iterator[RawRow], iter(()))

    def _next(self) -> RawRow:
        while (row := next(self._rows, None)) is None:
            if self._file + 1 == len(self.source_files):
                message = "the files have fewer rows than when they were first read"
                fix = "do not change the files during preparation; start again"
                raise UserError(message, where=self.source_files[-1].name, fix=fix)
            self._open(self._file + 1)
        self._rows_read += 1
        return row


def detect_source_format(source_files: list[SourceFile], columns: Mapping[Any, str]) -> str:
    """The format of a source, from its first valid row.

    Raises:
        EmptyDataError: the source has no rows.
        UserError: no format has such columns, or no row can be read.
    """
    if source_files and all(source_file.is_prose for source_file in source_files):
        return "text"
    first_error: UserError | None = None
    for source_file in source_files:
        if source_file.is_prose:
            continue
        try:
            for number, parse in iter_rows(source_file, renamed=columns.values()):
                raw, location = parse(), source_file.location(number)
                if not isinstance(raw, UserError):
                    return detect_format(raw, columns, location)
                first_error = first_error or _with_location(raw, location)
        except UserError as error:
            first_error = first_error or error
    if first_error:
        raise first_error
    raise EmptyDataError("the source has no rows", where=source_files[0].name, fix="correct `path`")


def _check_file_kind(source_file: SourceFile, row_format: str) -> None:
    if source_file.is_prose and row_format != "text":
        message = f"a {source_file.kind} file contains plain text, not rows of {row_format}"
        raise UserError(message, where=source_file.name, fix="format: text")


def files_of_format(
    source_files: list[SourceFile], row_format: str, report: Callable[[str], None] = say
) -> list[SourceFile]:
    """The files of a source that can contain rows of a format; reports which are left out.

    A folder of conversations may contain a README.md; a source of texts reads it.

    Args:
        report: takes that line.
    """
    with_rows = [source_file for source_file in source_files if not source_file.is_prose]
    if row_format == "text" or not with_rows or len(with_rows) == len(source_files):
        return source_files
    prose = [Path(source_file.name) for source_file in source_files if source_file.is_prose]
    report(
        f"{prose[0].parent}: leaves out files of plain text, as the rows of the source are "
        f"{row_format}: {count_by_type(prose)}"
    )
    return with_rows


def _columns_of(row_format: str, columns: Mapping[Any, str]) -> tuple[str, ...]:
    known = ROW_FORMATS[row_format]
    return tuple(columns.get(name, name) for name in (*known.required, *known.optional))


@dataclass(frozen=True)
class SourceRows:
    """The files of a source, and how to read them.

    Attributes:
        name: the path that the recipe names.
        files: the source's files, in order.
        row_format: a row format of the recipe, or "auto".
        columns: names of the format's columns in the files, where they differ.
    """

    name: str
    files: list[SourceFile]
    row_format: str
    columns: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[Record | BadRecord]:
        """All rows; unusable ones are faults."""
        return iter_records(self.files, self.row_format, self.columns)

    def location(self, item: Record | BadRecord) -> str:
        """The file and line of a row."""
        return self.files[item.file_index].location(item.row_number)

    def check_unchanged(self) -> None:
        """Check that the files still have the content that they had when they were found.

        Raises:
            UserError: a file changed.
        """
        for file in self.files:
            file.check_unchanged(again=True)


def open_source(source: Source) -> SourceRows:
    """Find the files of a source, and detect its format if it is "auto".

    Raises:
        UserError: there is nothing to read.
    """
    files = find_source_files(source, store_folder())
    columns: dict[Any, str] = dict(source.columns)
    try:
        row_format = (
            detect_source_format(files, columns) if source.format == "auto" else source.format
        )
    except EmptyDataError:
        row_format = "text"  # an empty source gets a report too
    return SourceRows(source.path, files_of_format(files, row_format), row_format, columns)
