"""A safetensors file rewritten tensor by tensor, row block by row block.

Names, shapes and dtypes stay, so the header stays, to the byte: what is not changed is copied
as bytes, whatever its dtype, and of what is changed one block of rows is in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.hashes import BLOCK_BYTES
from dtrain.core.log import Meter
from dtrain.merge.adapter import FLOATS
from dtrain.models.finite import all_finite
from dtrain.models.weights import read_header

# Blocks of rows as stored → the same blocks, new, any float; all of them, in order.
Change = Callable[[Iterator[Tensor]], Iterator[Tensor]]
BLOCK_ELEMENTS = 1 << 19
ROWS = 64  # blocks are multiples of it: see merge/methods.py and merge/nf4.py


class Hashed:
    """A file whose bytes are hashed as they pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes."""
        block = bytearray(size)
        read = self._file.readinto(block)  # type: ignore[attr-defined]
        if read != size:
            raise EOFError
        self._digest.update(block)
        return block

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of `data`."""
        self._digest.update(data)
        self._file.write(data)

    def sha256(self) -> str:
        """Of all that passed, as hex."""
        return self._digest.hexdigest()


def rewrite_file(
    source: Path, target: Path, changes: Mapping[str, Change], bar: Meter
) -> tuple[str, str]:
    """Write `source` to `target` with some tensors changed, each rounded once to its own dtype.

    Args:
        target: replaced if it is there; on the disk when this returns.
        bar: advanced by one a tensor.

    Returns:
        SHA-256 of the source and of the target.

    Raises:
        UserError: a new value that is not finite, a source that shrinks while it is read.
    """
    entries, head = read_header(source)
    try:
        with open(source, "rb") as old, open(target, "wb") as new:
            reader, writer = Hashed(old), Hashed(new)
            writer.write(reader.read(len(head)))
            for name, entry in entries.items():
                if name in changes:
                    _change(reader, writer, name, entry, changes[name])
                else:
                    _copy(reader, writer, entry)
                bar.advance()
            new.flush()
            os.fsync(new.fileno())
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error
    return reader.sha256(), writer.sha256()


def row_blocks(shape: list[int], elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of blocks of about `elements`.

    All are multiples of 64 rows but the last, which has at least 64 unless the tensor has fewer.
    """
    total, width = shape[0], max(prod(shape[1:]), 1)
    size = max(elements // width // ROWS, 1) * ROWS
    start = 0
    while start < total:
        stop = total if total - start < size + ROWS else start + size
        yield start, stop
        start = stop


def _size(entry: dict[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop - start)


def _copy(reader: Hashed, writer: Hashed, entry: dict[str, Any]) -> None:
    left = _size(entry)
    while left:
        block = reader.read(min(left, BLOCK_BYTES))
        writer.write(block)
        left -= len(block)


def _blocks(reader: Hashed, entry: dict[str, Any]) -> Iterator[Tensor]:
    dtype, shape = FLOATS[entry["dtype"]], entry["shape"] or [1]
    width = prod(shape[1:]) * dtype.itemsize
    for start, stop in row_blocks(shape):
        block = reader.read((stop - start) * width)
        yield torch.frombuffer(block, dtype=dtype).reshape(stop - start, *shape[1:])


def _change(
    reader: Hashed, writer: Hashed, name: str, entry: dict[str, Any], change: Change
) -> None:
    dtype, written = FLOATS[entry["dtype"]], 0
    for block in change(_blocks(reader, entry)):
        value = block.to(dtype).contiguous()
        if not all_finite(value):
            raise UserError(
                f"{name} is not finite in {entry['dtype']}", where="merge", status=Exit.NON_FINITE
            )
        writer.write(value.view(-1).view(torch.uint8).numpy().data)
        written += value.numel()
    assert written == prod(entry["shape"]), name
