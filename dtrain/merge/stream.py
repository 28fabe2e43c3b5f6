"""A safetensors file rewritten tensor by tensor, row block by row block.

Names, shapes and dtypes stay, so the header stays, to the byte: what is not changed is copied
as bytes, whatever its dtype, and of what is changed one block of rows is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.hash_cache import file_state, lookup_hash, remember_hash
from dtrain.core.log import Meter
from dtrain.merge.hashing_copy import HashingCopy, Source, Target
from dtrain.merge.tied_weights import FLOATS, StoredTensor
from dtrain.models.kernels.merge_rounding import round_into
from dtrain.models.weight_files import read_header

# Blocks of rows as stored → the same blocks, new, any float; all of them, in order.
# A block's memory is soon used again: whoever needs several at once copies them.
Change = Callable[[Iterator[Tensor]], Iterator[Tensor]]
BLOCK_ELEMENTS = 1 << 19
ROWS = 64  # blocks are multiples of it: see merge/methods.py and merge/nf4.py


@dataclass(frozen=True)
class Added:
    """A tensor that is written behind the others of its file: an old one, and what changes it."""

    old: StoredTensor
    change: Change


def rewrite_file(
    source: Path,
    target: Path,
    changes: Mapping[str, Change],
    bar: Meter,
    added: Mapping[str, Added] | None = None,
) -> tuple[str, str]:
    """Write `source` to `target` with some tensors changed, each rounded once to its own dtype.

    Args:
        target: replaced if it is there; on the disk when this returns.
        bar: advanced by one a tensor of the source.
        added: by name; those made from a tensor of another file are none of this file's.

    Returns:
        Hashes of the source and of the target.

    Raises:
        UserError: a new value that is not finite, a source that shrinks while it is read.
    """
    entries, head = read_header(source)
    known, state = lookup_hash(source), file_state(source)
    more = {name: one for name, one in (added or {}).items() if one.old.path == source}
    changed = bool(more) or not changes.keys().isdisjoint(entries)
    try:
        with HashingCopy(source, target, changed and known is None) as passage:
            passage.old.read(len(head))
            passage.new.write(memoryview(_head(head, more) if more else head))
            for name, entry in entries.items():
                if name in changes:
                    _change(passage, name, entry, changes[name])
                else:
                    start, stop = entry["data_offsets"]
                    passage.copy(stop - start)
                bar.advance()
            for name, one in more.items():
                blocks = (one.old.rows(*rows) for rows in row_blocks([*one.old.shape]))
                written = _put(passage.new, name, one.old.dtype, one.change(blocks))
                assert written == prod(one.old.shape), name
            before, after = passage.finish()
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error
    if known is None:
        known = before if changed else after
        remember_hash(source, known, state)
    return known, after


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


def _blocks(source: Source, entry: dict[str, Any]) -> Iterator[Tensor]:
    dtype, shape = FLOATS[entry["dtype"]], entry["shape"] or [1]
    width = prod(shape[1:]) * dtype.itemsize
    for start, stop in row_blocks(shape):
        rows = stop - start
        yield torch.frombuffer(source.read(rows * width), dtype=dtype).reshape(rows, *shape[1:])


def _head(head: bytes, added: Mapping[str, Added]) -> bytes:
    """A file's head that names these tensors too, behind the others."""
    entries = json.loads(head[8:])
    end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
    for name, one in added.items():
        start, end = end, end + one.old.stop - one.old.start
        entry = {"dtype": one.old.dtype, "shape": one.old.shape, "data_offsets": [start, end]}
        entries[name] = entry
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _change(passage: HashingCopy, name: str, entry: dict[str, Any], change: Change) -> None:
    written = _put(passage.new, name, entry["dtype"], change(_blocks(passage.old, entry)))
    assert written == prod(entry["shape"]), name


def _put(target: Target, name: str, dtype: str, blocks: Iterator[Tensor]) -> int:
    """Write the blocks that a tensor became; return how many elements they have."""
    written = 0
    for block in blocks:
        if not _write(target, block.contiguous().view(-1), FLOATS[dtype]):
            raise UserError(
                f"{name} is not finite in {dtype}", where="merge", status=Exit.NON_FINITE
            )
        written += block.numel()
    return written


def _write(target: Target, values: Tensor, dtype: torch.dtype) -> bool:
    """Round values and write them; return whether all are finite."""
    if not target.is_at_multiple(dtype.itemsize):  # an odd header, or an odd tensor before
        rounded = torch.empty(len(values), dtype=dtype)
        finite = round_into(values, rounded)
        target.write(rounded.view(torch.uint8).numpy().data)
        return finite
    finite, at = True, 0
    for space in target.spaces(len(values) * dtype.itemsize):
        rounded = torch.frombuffer(space, dtype=dtype)
        finite &= round_into(values[at : at + len(rounded)], rounded)
        at += len(rounded)
    return finite
