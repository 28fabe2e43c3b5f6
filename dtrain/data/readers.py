"""Read files of any kind into raw rows; an unreadable row does not end the file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast, get_args

from dtrain.config.objectives import Column
from dtrain.core.errors import UserError, first_line
from dtrain.core.files import decode_text, strip_bom
from dtrain.core.lazy_import import LazyModule
from dtrain.data.conversations import TRAIN_FLAGS
from dtrain.data.sources import PACKERS, PROSE, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:  # `dtrain check` reads rows too, and shall start at once
    pa, pq = LazyModule("pyarrow"), LazyModule("pyarrow.parquet")

# The row's number, from 1, and a function that returns the row, or a UserError.
RawRow = tuple[int, Callable[[], Any]]

BATCH_ROWS = 1000
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
        return _dataset(source_file, needed)
    kind = source_file.kind.removesuffix(".gz").removesuffix(".zst")
    if kind == ".parquet":
        return _parquet(source_file, needed)
    if kind == ".arrow":
        return _arrow(source_file)
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
        yield number, partial(_unchanged, row)


def _unchanged(row: Any) -> Any:
    return row


def _batch_rows(batch: pa.RecordBatch, first: int) -> Iterator[RawRow]:
    """Rows of an Arrow batch; the batch is converted when the first of them is parsed.

    Raises:
        ArrowInvalid: offsets point outside the batch, or a text is not UTF-8.
    """
    batch.validate(full=True)
    values = lru_cache(maxsize=1)(partial(_values, batch))
    for index in range(batch.num_rows):
        yield first + index, partial(_item, values, index)


def _item(values: Callable[[], list[Any]], index: int) -> Any:
    return values()[index]


def _values(batch: pa.RecordBatch) -> list[Any]:
    return list(map(_null_remover(pa.struct(batch.schema)), batch.to_pylist()))


def _null_remover(kind: pa.DataType, column: bool = True) -> Callable[[Any], Any]:
    """A function that removes the nulls of structs from a value of an Arrow type.

    If the objects of a column have different keys, Arrow gives each object all keys and fills in
    nulls. Nulls in lists, maps and whole columns are the file's own.
    """
    if pa.types.is_struct(kind):
        inner = {field.name: _null_remover(field.type, False) for field in kind}
        return partial(_struct, inner, keep=column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _null_remover(kind.value_type, False)
        return _unchanged if item is _unchanged else partial(_list, item)
    return _unchanged


def _struct(inner: dict[str, Callable[[Any], Any]], value: Any, *, keep: bool) -> Any:
    if value is None:
        return None
    return {k: inner[k](v) for k, v in value.items() if keep or v is not None}


def _list(item: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else [item(element) for element in value]


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
            header = _header(cells, source_file)
        elif cells:
            yield number, partial(_table_row, header, cells)
        number = reader.line_num + 1


def _header(cells: list[str], source_file: SourceFile) -> list[str]:
    if duplicates := [name for name in filter(None, dict.fromkeys(cells)) if cells.count(name) > 1]:
        message = f"duplicate column `{duplicates[0]}`"
        raise UserError(message, where=source_file.location(1), fix="rename or remove one of them")
    return cells


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


def _parquet(source_file: SourceFile, needed: tuple[str, ...] | None) -> Iterator[RawRow]:
    number = 0
    try:
        with pq.ParquetFile(source_file.path) as file:
            columns = _present(source_file, file.schema_arrow.names, needed)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from _batch_rows(batch, number + 1)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"invalid parquet file: {reason}", where=source_file.location(number + 1)
        ) from error


def _arrow(source_file: SourceFile) -> Iterator[RawRow]:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    number = 0
    try:
        with pa.memory_map(str(source_file.path)) as file:
            for batch in _batches(file):
                _header(batch.schema.names, source_file)
                yield from _batch_rows(batch, number + 1)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"invalid arrow file: {reason}", where=source_file.location(number + 1)
        ) from error


def _batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        file.seek(0)
        yield from pa.ipc.open_stream(file)


def _dataset(source_file: SourceFile, needed: tuple[str, ...] | None) -> Iterator[RawRow]:
    assert source_file.dataset is not None
    selected = source_file.dataset.select_columns(
        _present(source_file, source_file.dataset.column_names, needed)
    )
    remove_nulls = _null_remover(pa.struct(selected.features.arrow_schema))
    return _parsed(enumerate(map(remove_nulls, selected), start=1))


def _present(
    source_file: SourceFile, names: list[str], needed: tuple[str, ...] | None
) -> list[str]:
    """The columns to read; all columns if no needed one exists, so that errors can name them."""
    _header(names, source_file)
    return [name for name in names if needed is None or name in needed] or names
