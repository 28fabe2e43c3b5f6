"""A safetensors file rewritten tensor by tensor, row block by row block.

Names, shapes and dtypes stay, so the header stays, to the byte: what is not changed is copied
as bytes, whatever its dtype, and of what is changed one block of rows is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.log import Meter
from dtrain.merge.adapter import FLOATS
from dtrain.merge.passage import Passage
from dtrain.models.kernels.merging import round_into
from dtrain.models.weights import read_header

# Blocks of rows as stored → the same blocks, new, any float; all of them, in order.
# A block's memory is soon used again: whoever needs several at once copies them.
Change = Callable[[Iterator[Tensor]], Iterator[Tensor]]
BLOCK_ELEMENTS = 1 << 19
ROWS = 64  # blocks are multiples of it: see merge/methods.py and merge/nf4.py


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
        with Passage(source, target) as passage:
            passage.copy(len(head))
            for name, entry in entries.items():
                if name in changes:
                    _change(passage, name, entry, changes[name])
                else:
                    start, stop = entry["data_offsets"]
                    passage.copy(stop - start)
                bar.advance()
            return passage.finish()
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error


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
        room = passage.room(block.numel() * dtype.itemsize)
        rounded = torch.frombuffer(room, dtype=dtype).view(block.shape)
        if not round_into(block.contiguous(), rounded):
            raise UserError(
                f"{name} is not finite in {entry['dtype']}", where="merge", status=Exit.NON_FINITE
            )
        passage.write_room(room)
        written += block.numel()
    assert written == prod(entry["shape"]), name
