"""Rows of parquet and arrow files, and of datasets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from dtrain.core.errors import UserError, first_line
from dtrain.core.lazy_import import LazyModule
from dtrain.data.sources import RawRow, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:  # `dtrain check` reads rows too, and shall start at once
    pa, pq = LazyModule("pyarrow"), LazyModule("pyarrow.parquet")

BATCH_ROWS = 1000


def parquet_rows(source_file: SourceFile, needed: tuple[str, ...] | None) -> Iterator[RawRow]:
    """Rows of a parquet file.

    Args:
        needed: columns to read; None for all.

    Raises:
        UserError: the rest of the file cannot be read.
    """
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


def arrow_rows(source_file: SourceFile) -> Iterator[RawRow]:
    """Rows of Arrow's file format, or of its stream format, which `datasets` writes.

    Raises:
        UserError: the rest of the file cannot be read.
    """
    number = 0
    try:
        with pa.memory_map(str(source_file.path)) as file:
            for batch in _batches(file):
                source_file.check_columns(batch.schema.names)
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


def dataset_rows(source_file: SourceFile, needed: tuple[str, ...] | None) -> Iterator[RawRow]:
    """Rows of a dataset of the `datasets` library; arguments and errors as for `parquet_rows`."""
    assert source_file.dataset is not None
    columns = _present(source_file, source_file.dataset.column_names, needed)
    selected = source_file.dataset.select_columns(columns)
    remove_nulls = _null_remover(pa.struct(selected.features.arrow_schema))
    for number, row in enumerate(selected, start=1):
        yield number, partial(remove_nulls, row)


def _present(
    source_file: SourceFile, names: list[str], needed: tuple[str, ...] | None
) -> list[str]:
    """The columns to read; all columns if no needed one exists, so that errors can name them."""
    source_file.check_columns(names)
    return [name for name in names if needed is None or name in needed] or names


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
        return unchanged if item is unchanged else partial(_list, item)
    return unchanged


def unchanged(row: Any) -> Any:
    """The row itself, where a function is needed that returns it."""
    return row


def _struct(inner: dict[str, Callable[[Any], Any]], value: Any, *, keep: bool) -> Any:
    if value is None:
        return None
    return {k: inner[k](v) for k, v in value.items() if keep or v is not None}


def _list(item: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else [item(element) for element in value]
