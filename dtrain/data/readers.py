"""Files of any kind into raw rows; a row that cannot be read is told, and the next one follows."""

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
from typing import IO, Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from dtrain.config.schema import Column
from dtrain.core.errors import UserError
from dtrain.core.files import decode_text, without_mark
from dtrain.data.conversations import MARKS
from dtrain.data.sources import SourceFile

# Number of the row, from 1, and what parses it: into the row, or what is wrong with it.
Raw = tuple[int, Callable[[], Any]]

BATCH_ROWS = 1000
MAX_LINE_BYTES = 1 << 25  # no row is this long; what is, is another kind of file
csv.field_size_limit(min(MAX_LINE_BYTES, sys.maxsize))


def rows(
    part: SourceFile, wanted: tuple[str, ...] | None = None, renamed: Collection[str] = ()
) -> Iterator[Raw]:
    """All rows of a part, each parsed only when it is asked for.

    Args:
        part: of a source.
        wanted: columns to read where a file can leave others out; None for all.
        renamed: columns of the source that are called otherwise than the format calls them.

    Raises:
        UserError: nothing more of this part can be read.
    """
    if part.rows is not None:
        return _dataset(part, wanted)
    kind = part.kind.removesuffix(".gz").removesuffix(".zst")
    if kind == ".parquet":
        return _parquet(part, wanted)
    if kind == ".arrow":
        return _arrow(part)
    if kind == ".json":
        columns = {*get_args(Column), *(wanted or ()), *renamed}
        return _json(part, columns.difference(MARKS))  # which hold no rows, as `train` can
    return {".txt": _txt, ".jsonl": _jsonl, ".csv": _csv}[kind](part)


def _parsed(rows: Iterable[tuple[int, Any]]) -> Iterator[Raw]:
    """Rows of a file that is parsed as a whole."""
    for number, row in rows:
        yield number, partial(_same, row)


def _same(row: Any) -> Any:
    return row


def _of_batch(batch: pa.RecordBatch, first: int) -> Iterator[Raw]:
    """Rows of an Arrow batch, turned into Python's values once the first of them is asked for."""
    known = lru_cache(maxsize=1)(partial(_values, batch))
    for place in range(batch.num_rows):
        yield first + place, partial(_at, known, place)


def _at(known: Callable[[], list[Any]], place: int) -> Any:
    return known()[place]


def _values(batch: pa.RecordBatch) -> list[Any]:
    return list(map(_without_filled(pa.struct(batch.schema)), batch.to_pylist()))


def _without_filled(kind: pa.DataType, column: bool = True) -> Callable[[Any], Any]:
    """What takes from a value of an Arrow type the nulls of its structs.

    Where objects of a column differ in their keys, Arrow gives each of them the keys of all, and
    fills in nulls. A null of a list, of a map or of a whole column was written by someone.
    """
    if pa.types.is_struct(kind):
        inner = {field.name: _without_filled(field.type, False) for field in kind}
        return partial(_struct, inner, keep=column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _without_filled(kind.value_type, False)
        return _same if item is _same else partial(_list, item)
    return _same


def _struct(inner: dict[str, Callable[[Any], Any]], value: Any, *, keep: bool) -> Any:
    if value is None:
        return None
    return {k: inner[k](v) for k, v in value.items() if keep or v is not None}


def _list(item: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else [item(one) for one in value]


def _open(part: SourceFile) -> IO[bytes]:
    assert part.path is not None
    if part.kind.endswith(".gz"):
        return cast(IO[bytes], gzip.open(part.path, "rb"))
    if part.kind.endswith(".zst"):
        stream: Any = pa.input_stream(str(part.path), compression="zstd")
        return io.BufferedReader(stream)
    return open(part.path, "rb")


def _broken_file(part: SourceFile, number: int, error: Exception) -> UserError:
    """A file whose bytes end or go wrong in the middle."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    what = f"the file is cut short or damaged: {reason}"
    return UserError(what, where=part.location(number), fix="fetch the file again")


def _content(part: SourceFile) -> bytes:
    try:
        with _open(part) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _broken_file(part, 1, error) from error
    _refuse_empty_zst(part, bool(content))
    return content


def _refuse_empty_zst(part: SourceFile, has_content: bool) -> None:
    """The decoder takes a frame that ends before its first block for an empty one."""
    if part.kind.endswith(".zst") and not has_content and Path(str(part.path)).stat().st_size > 16:
        raise _broken_file(part, 1, EOFError("no complete block in it"))


def _txt(part: SourceFile) -> Iterator[Raw]:
    if text := decode_text(_content(part), part.name):
        yield from _parsed([(1, {"text": text})])


def _jsonl(part: SourceFile) -> Iterator[Raw]:
    for number, line in _lines(part):
        if isinstance(line, UserError):
            yield from _parsed([(number, line)])
        elif not line.isspace():
            yield number, partial(parse_json, line, part, number)


def _lines(part: SourceFile) -> Iterator[tuple[int, bytes | UserError]]:
    """Lines with their numbers; one that is too long is skipped without being held in memory."""
    number = 0
    try:
        with _open(part) as file:
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if number == 1 and not (line := without_mark(line, part.name)):
                    return
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    yield number, _too_long(_skip_line(file) + len(line), part, number)
                else:
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise _broken_file(part, number + 1, error) from error
    _refuse_empty_zst(part, number > 0)


def _skip_line(file: IO[bytes]) -> int:
    skipped = 0
    while piece := file.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _too_long(size: int, part: SourceFile, number: int) -> UserError:
    what = f"a line of {size:,} bytes; the longest that is read has {MAX_LINE_BYTES:,}"
    return UserError(what, where=part.location(number), fix="split the row, or remove it")


def parse_json(line: bytes, part: SourceFile, first_line: int) -> Any:
    """JSON that starts in `first_line` of a part; what is wrong with it is returned."""
    try:
        return json.loads(line, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        at = min(error.pos, len(error.doc.rstrip()))  # what breaks off is missed behind its line
        before = error.doc[:at].split("\n")
        where = f"{part.name}:{first_line + len(before) - 1}"
        what = f"broken JSON: {error.msg} (column {len(before[-1]) + 1})"
        return UserError(what, where=where, fix="mend or remove the line")
    except UnicodeDecodeError as error:
        where = f"{part.name}:{first_line + line[: error.start].count(10)}"
        return UserError("not UTF-8", where=where, fix="convert the file to UTF-8")
    except RecursionError:
        return UserError("JSON nested too deeply", where=f"{part.name}:{first_line}")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any] | UserError:
    """An object of JSON, or what is wrong with it or with an object in it."""
    found = dict(pairs)
    for value in found.values():
        if fault := _fault_in(value):
            return fault
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        return UserError(f"the key `{twice}` is there twice", fix="keep one of them")
    return found


def _fault_in(value: Any) -> UserError | None:
    if isinstance(value, list):
        return next((fault for one in value if (fault := _fault_in(one))), None)
    return value if isinstance(value, UserError) else None


def _json(part: SourceFile, columns: Collection[str]) -> Iterator[Raw]:
    """A list of rows, an object that holds such a list, or one row.

    Or one row a line, as some call .json what is .jsonl.
    """
    filled = (line for _, line in _lines(part) if isinstance(line, UserError) or line.strip())
    first = list(islice(filled, 2))
    if len(first) == 2 and isinstance(first[0], bytes):
        parsed = parse_json(first[0], part, 1)
        if isinstance(parsed, dict):
            yield from _jsonl(part)
            return
    whole = parse_json(without_mark(_content(part), part.name), part, 1) if first else []
    if isinstance(whole, UserError):
        if len(first) == 2 and all(_is_object(line) for line in first):
            yield from _jsonl(part)  # says which lines are broken
            return
        raise UserError(whole.message, where=whole.where or part.name, fix=whole.fix)
    yield from _parsed(enumerate(_rows_in(whole, part, columns), start=1))


def _is_object(line: bytes | UserError) -> bool:
    """Whether a line looks like one row; what is too long to be looked at may be one."""
    return isinstance(line, UserError) or line.lstrip().startswith(b"{")


def _rows_in(whole: Any, part: SourceFile, columns: Collection[str]) -> list[Any]:
    """The rows of a JSON file: its list, or the only list of objects in its object.

    Raises:
        UserError: several of its keys hold rows.
    """
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict) or any(column in whole for column in columns):
        return [whole]
    lists = {key: value for key, value in whole.items() if _is_rows(value)}
    if len(lists) > 1:
        what = f"several keys hold rows: {', '.join(lists)}"
        raise UserError(what, where=part.name, fix="write each list into a file of its own")
    return next(iter(lists.values()), [whole])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict | UserError) for one in value)


def _csv(part: SourceFile) -> Iterator[Raw]:
    reader = csv.reader(_texts(part), strict=True)
    header: list[str] | None = None
    number = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = f"broken CSV: {error}"
            raise UserError(what, where=part.location(number), fix="mend the file") from error
        if cells is None:
            return
        if header is None:
            header = _header(cells, part)
        elif cells:
            yield number, partial(_csv_row, header, cells)
        number = reader.line_num + 1


def _header(cells: list[str], part: SourceFile) -> list[str]:
    if twice := [name for name in filter(None, dict.fromkeys(cells)) if cells.count(name) > 1]:
        what = f"the column `{twice[0]}` is there twice"
        raise UserError(what, where=part.location(1), fix="rename or remove one of them")
    return cells


def _csv_row(header: list[str], cells: list[str]) -> dict[str, str] | UserError:
    if len(cells) != len(header):
        what = f"{len(cells)} cells, but the first line names {len(header)} columns"
        return UserError(what, fix="mend or remove the row")
    return dict(zip(header, cells, strict=True))


def _texts(part: SourceFile) -> Iterator[str]:
    for number, line in _lines(part):
        if isinstance(line, UserError):
            raise line
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            fix = "convert the file to UTF-8"
            raise UserError("not UTF-8", where=part.location(number), fix=fix) from error


def _parquet(part: SourceFile, wanted: tuple[str, ...] | None) -> Iterator[Raw]:
    number = 0
    try:
        with pq.ParquetFile(part.path) as file:
            columns = _present(part, file.schema_arrow.names, wanted)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                yield from _of_batch(batch, number + 1)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"broken parquet: {reason}", where=part.location(number + 1)) from error


def _arrow(part: SourceFile) -> Iterator[Raw]:
    """Arrow's file format, or its stream format, which `datasets` writes."""
    number = 0
    try:
        with pa.memory_map(str(part.path)) as file:
            for batch in _batches(file):
                _header(batch.schema.names, part)
                yield from _of_batch(batch, number + 1)
                number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"broken arrow file: {reason}", where=part.location(number + 1)) from error


def _batches(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)
    else:
        file.seek(0)
        yield from pa.ipc.open_stream(file)


def _dataset(part: SourceFile, wanted: tuple[str, ...] | None) -> Iterator[Raw]:
    assert part.rows is not None
    chosen = part.rows.select_columns(_present(part, part.rows.column_names, wanted))
    bare = _without_filled(pa.struct(chosen.features.arrow_schema))
    return _parsed(enumerate(map(bare, chosen), start=1))


def _present(part: SourceFile, names: list[str], wanted: tuple[str, ...] | None) -> list[str]:
    """The columns to read; all, if none of those wanted is there, for a message that names them."""
    _header(names, part)
    return [name for name in names if wanted is None or name in wanted] or names
