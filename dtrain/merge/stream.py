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
BEGUN_BYTES = 8 << 20
ROWS = 64  # blocks are multiples of it: see merge/methods.py and merge/nf4.py


class Passage:
    """Bytes on their way from one file to another, hashed on both sides: once while they agree."""

    def __init__(self, old: IO[bytes], new: IO[bytes]) -> None:
        self._old, self._new = old, new
        self._before = self._after = hashlib.sha256()
        self._written = self._begun = 0

    def part(self) -> None:
        """What is written need not be what is read any more."""
        if self._after is self._before:
            self._after = self._before.copy()

    def read(self, size: int) -> bytearray:
        """Exactly `size` bytes."""
        block = bytearray(size)
        read = self._old.readinto(block)  # type: ignore[attr-defined]
        if read != size:
            raise EOFError
        self._before.update(block)
        return block

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """All of `data`; the disk begins to take it at once, so that the fsync has little to do."""
        self._new.write(data)
        if self._after is not self._before:
            self._after.update(data)
        self._written += len(data)
        if self._written - self._begun >= BEGUN_BYTES:
            span = self._begun, self._written - self._begun
            os.posix_fadvise(self._new.fileno(), *span, os.POSIX_FADV_DONTNEED)
            self._begun = self._written

    def copy(self, size: int) -> None:
        """Let `size` bytes pass as they are."""
        for at in range(0, size, BLOCK_BYTES):
            self.write(self.read(min(BLOCK_BYTES, size - at)))

    def hashes(self) -> tuple[str, str]:
        """SHA-256 of all that was read and of all that was written, as hex."""
        return self._before.hexdigest(), self._after.hexdigest()


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
            passage = Passage(old, new)
            passage.copy(len(head))
            for name, entry in entries.items():
                if name in changes:
                    _change(passage, name, entry, changes[name])
                else:
                    start, stop = entry["data_offsets"]
                    passage.copy(stop - start)
                bar.advance()
            new.flush()
            os.fsync(new.fileno())
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error
    return passage.hashes()


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


def _blocks(passage: Passage, entry: dict[str, Any]) -> Iterator[Tensor]:
    dtype, shape = FLOATS[entry["dtype"]], entry["shape"] or [1]
    width = prod(shape[1:]) * dtype.itemsize
    for start, stop in row_blocks(shape):
        rows = stop - start
        yield torch.frombuffer(passage.read(rows * width), dtype=dtype).reshape(rows, *shape[1:])


def _change(passage: Passage, name: str, entry: dict[str, Any], change: Change) -> None:
    dtype, written = FLOATS[entry["dtype"]], 0
    passage.part()
    for block in change(_blocks(passage, entry)):
        value = block.to(dtype).contiguous()
        if not all_finite(value):
            raise UserError(
                f"{name} is not finite in {entry['dtype']}", where="merge", status=Exit.NON_FINITE
            )
        passage.write(value.view(-1).view(torch.uint8).numpy().data)
        written += value.numel()
        del block, value  # before the next block is read
    assert written == prod(entry["shape"]), name
