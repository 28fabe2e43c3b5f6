"""Read files of any kind into raw rows; an unreadable row does not end the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast, get_args

from dtrain.config.objectives import Column
from dtrain.core.errors import UserError, first_line
from dtrain.core.files import decode_text, strip_bom
from dtrain.core.lazy_import import LazyModule
from dtrain.data.arrow_rows import arrow_rows, dataset_rows, parquet_rows, unchanged
from dtrain.data.conversations import TRAIN_FLAGS
from dtrain.data.sources import PACKERS, PROSE, RawRow, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa
else:  # `dtrain check` reads rows too, and shall start at once
    pa = LazyModule("pyarrow")

MAX_LINE_BYTES = 1 << 25  # longer lines belong to another kind of file
MAX_EXPANSION = 200  # texts shrink to a twentieth; a file made to fill the memory, to a thousandth
csv.field_size_limit(min(MAX_LINE_BYTES, sys.maxsize))


def iter_rows(
    source_file: SourceFile, needed: tuple[str, ...] | None = None, renamed: Collection[str] = ()
) -> Iterator[RawRow]:
    """All rows of a file, each parsed on demand.

    Args:
        source_file: of a source.
        needed: columns to read, if the file stores columns separately; None for all.
        renamed: names in the files of columns that the recipe maps.

    Raises:
        UserError: the rest of the file cannot be read.
    """
    if source_file.dataset is not None:
        return dataset_rows(source_file, needed)
    kind = source_file.kind.removesuffix(".gz").removesuffix(".zst")
    if kind == ".parquet":
        return parquet_rows(source_file, needed)
    if kind == ".arrow":
        return arrow_rows(source_file)
    if kind == ".json":
        columns = {*get_args(Column), *(needed or ()), *renamed}
        return _json(source_file, columns.difference(TRAIN_FLAGS))  # a key `train` can contain rows
    if kind in PROSE:
        return _prose(source_file)
    if kind == ".jsonl":
        return _jsonl(source_file)
    return _table(source_file, delimiter="\t" if kind == ".tsv" else ",")


def _parsed(iter_rows: Iterable[tuple[int, Any]]) -> Iterator[RawRow]:
    """Rows that are parsed already."""
    for number, row in iter_rows:
        yield number, partial(unchanged, row)


def _open_stream(source_file: SourceFile) -> IO[bytes]:
    assert source_file.path is not None
    if source_file.kind.endswith(".gz"):
        return cast(IO[bytes], gzip.open(source_file.path, "rb"))
    if source_file.kind.endswith(".zst"):
        stream: Any = pa.input_stream(str(source_file.path), compression="zstd")
        return io.BufferedReader(stream)
    return open(source_file.path, "rb")


def _broken_file(source_file: SourceFile, number: int, error: Exception) -> UserError:
    """The error for a truncated or damaged file."""
    reason = first_line(error)
    message = f"the file is truncated or damaged: {reason}"
    return UserError(message, where=source_file.location(number), fix="download the file again")


def _content(source_file: SourceFile) -> bytes:
    packed = source_file.kind.endswith(PACKERS)
    limit = MAX_EXPANSION * Path(str(source_file.path)).stat().st_size + MAX_LINE_BYTES
    try:
        with _open_stream(source_file) as file:
            content = file.read(limit) if packed else file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _broken_file(source_file, 1, error) from error
    if packed and len(content) == limit:
        message = f"expands to more than {MAX_EXPANSION} times its size, in memory"
        raise UserError(message, where=source_file.name, fix="unpack it, or write JSON lines")
    _check_zst_complete(source_file, bool(content))
    return content


def _check_zst_complete(source_file: SourceFile, has_content: bool) -> None:
    """Raise if a zst frame has no block; the decoder reads such a truncated file as empty."""
    if (
        source_file.kind.endswith(".zst")
        and not has_content
        and Path(str(source_file.path)).stat().st_size > 16
    ):
        raise _broken_file(source_file, 1, EOFError("it contains no complete block"))


def _prose(source_file: SourceFile) -> Iterator[RawRow]:
    if text := decode_text(_content(source_file), source_file.name):
        yield from _parsed([(1, {"text": text})])


def _jsonl(source_file: SourceFile) -> Iterator[RawRow]:
    for number, line in _lines(source_file):
        if isinstance(line, UserError):
            yield from _parsed([(number, line)])
        elif not line.isspace():
            yield number, partial(parse_json, line, source_file, number)


def _lines(source_file: SourceFile) -> Iterator[tuple[int, bytes | UserError]]:
    """Lines with their numbers; a line that is too long is skipped without loading it."""
    number = 0
    try:
        with _open_stream(source_file) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if number == 1 and not (line := strip_bom(line, source_file.name)):
                    return
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    yield number, _too_long(_skip_line(file) + len(line), source_file, number)
                else:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise _broken_file(source_file, number + 1, error) from error
    _check_zst_complete(source_file, number > 0)


def _skip_line(file: IO[bytes]) -> int:
    skipped = 0
    while chunk := file.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _too_long(size: int, source_file: SourceFile, number: int) -> UserError:
    message = f"the line has {size:,} bytes, the maximum is {MAX_LINE_BYTES:,}"
    return UserError(message, where=source_file.location(number), fix="split or remove this row")


def parse_json(line: bytes, source_file: SourceFile, first_line: int) -> Any:
    """Parse JSON that starts in `first_line` of a file; errors are returned, not raised."""
    try:
        return json.loads(line, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        at = min(error.pos, len(error.doc.rstrip()))  # truncated JSON is reported in its last line
        before = error.doc[:at].split("\n")
        where = f"{source_file.name}:{first_line + len(before) - 1}"
        problem = error.msg.removesuffix(" at")
        message = f"invalid JSON: {problem} (column {len(before[-1]) + 1})"
        return UserError(message, where=where, fix="fix or remove this line")
    except UnicodeDecodeError as error:
        where = f"{source_file.name}:{first_line + line[: error.start].count(10)}"
        return UserError("not UTF-8", where=where, fix="convert the file to UTF-8")
    except RecursionError:
        return UserError("JSON nested too deeply", where=f"{source_file.name}:{first_line}")
    except ValueError as error:  # a number with thousands of digits
        where = f"{source_file.name}:{first_line}"
        return UserError(f"invalid JSON: {error}", where=where, fix="fix or remove this line")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | UserError:
    """A JSON object, or the first error in it or in its values."""
    parsed = dict(pairs)
    for value in parsed.values():
        if error := _find_error(value):
            return error
    if len(parsed) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        return UserError(f"duplicate key `{duplicate}`", fix="keep one of them")
    return parsed


def _find_error(value: Any) -> UserError | None:
    if isinstance(value, list):
        return next((error for item in value if (error := _find_error(item))), None)
    return value if isinstance(value, UserError) else None


def _json(source_file: SourceFile, columns: Collection[str]) -> Iterator[RawRow]:
    """A list of rows, an object that contains such a list, or a single row.

    Or one row per line: some .json files are JSON lines.
    """
    lines = (line for _, line in _lines(source_file) if isinstance(line, UserError) or line.strip())
    first = list(islice(lines, 2))
    if len(first) == 2 and isinstance(first[0], bytes):
        parsed = parse_json(first[0], source_file, 1)
        if isinstance(parsed, dict):
            yield from _jsonl(source_file)
            return
    document = (
        parse_json(strip_bom(_content(source_file), source_file.name), source_file, 1)
        if first
        else []
    )
    if isinstance(document, UserError):
        if len(first) == 2 and all(_is_object(line) for line in first):
            yield from _jsonl(source_file)  # reports the invalid lines
            return
        raise UserError(
            document.message, where=document.where or source_file.name, fix=document.fix
        )
    yield from _parsed(enumerate(_rows_in(document, source_file, columns), start=1))


def _is_object(line: bytes | UserError) -> bool:
    """Whether a line looks like a row; a line that is too long counts as one."""
    return isinstance(line, UserError) or line.lstrip().startswith(b"{")


def _rows_in(document: Any, source_file: SourceFile, columns: Collection[str]) -> list[Any]:
    """The rows of a JSON file: its list, or the only list of objects in its object.

    Raises:
        UserError: several keys contain rows.
    """
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or any(column in document for column in columns):
        return [document]
    lists = {key: value for key, value in document.items() if _is_rows(value)}
    if len(lists) > 1:
        message = f"several keys contain rows: {', '.join(lists)}"
        raise UserError(message, where=source_file.name, fix="write each list into a separate file")
    return next(iter(lists.values()), [document])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict | UserError) for item in value)


def _table(source_file: SourceFile, delimiter: str) -> Iterator[RawRow]:
    reader = csv.reader(_texts(source_file), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            message = f"invalid {source_file.kind[1:4].upper()}: {error}"
            raise UserError(
                message, where=source_file.location(number), fix="fix the file"
            ) from error
        if cells is None:
            return
        if header is None:
            source_file.check_columns(cells)
            header = cells
        elif cells:
            yield number, partial(_table_row, header, cells)
        number = reader.line_num + 1


def _table_row(header: list[str], cells: list[str]) -> dict[str, str] | UserError:
    if len(cells) != len(header):
        message = f"{len(cells)} cells, but the header has {len(header)} columns"
        return UserError(message, fix="fix or remove this row")
    return dict(zip(header, cells, strict=True))


def _texts(source_file: SourceFile) -> Iterator[str]:
    for number, line in _lines(source_file):
        if isinstance(line, UserError):
            raise line
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            fix = "convert the file to UTF-8"
            raise UserError("not UTF-8", where=source_file.location(number), fix=fix) from error
