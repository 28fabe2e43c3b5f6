"""A safetensors file rewritten tensor by tensor, one block of rows at a time.

Names, shapes and dtypes stay, so the header stays byte for byte. Tensors that do not change are
copied as bytes, whatever their dtype; of those that change, one block of rows is in memory.
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
from dtrain.merge.base_tensors import FLOATS, StoredTensor
from dtrain.merge.hashing_copy import HashingCopy, HashingReader, HashingWriter
from dtrain.models.kernels.merge_rounding import round_into
from dtrain.models.weight_files import read_header

# Blocks of rows as stored → the same blocks with new values in any float dtype; all, in order.
# A block's memory is reused soon: copy the blocks to hold several at once.
ChangeBlocks = Callable[[Iterator[Tensor]], Iterator[Tensor]]
BLOCK_ELEMENTS = 1 << 19
ROWS = 64  # blocks are multiples of it: see merge/weight_delta.py and merge/nf4.py


@dataclass(frozen=True)
class AddedTensor:
    """A tensor appended to its file: an existing one, and how it changes."""

    old: StoredTensor
    change: ChangeBlocks


def rewrite_file(
    source: Path,
    target: Path,
    changes: Mapping[str, ChangeBlocks],
    bar: Meter,
    added: Mapping[str, AddedTensor] | None = None,
) -> tuple[str, str]:
    """Write `source` to `target` with some tensors changed, each rounded once to its own dtype.

    Args:
        target: replaced if it exists; on the disk when this returns.
        bar: advanced by one for each tensor of the source.
        added: by name; those made from a tensor of another file are skipped.

    Returns:
        Hashes of the source and of the target.

    Raises:
        UserError: a new value is not finite, or the source shrinks while it is read.
    """
    entries, header = read_header(source)
    source_hash, state = lookup_hash(source), file_state(source)
    here = {name: tensor for name, tensor in (added or {}).items() if tensor.old.path == source}
    changed = bool(here) or not changes.keys().isdisjoint(entries)
    try:
        with HashingCopy(source, target, changed and source_hash is None) as files:
            files.source.read(len(header))
            files.target.write(memoryview(_extend_header(header, here) if here else header))
            for name, entry in entries.items():
                if name in changes:
                    blocks = changes[name](_read_blocks(files.source, entry))
                    _write_blocks(files.target, name, entry["dtype"], entry["shape"], blocks)
                else:
                    start, stop = entry["data_offsets"]
                    files.copy(stop - start)
                bar.advance()
            for name, tensor in here.items():
                old = tensor.old
                blocks = tensor.change(old.rows(*rows) for rows in row_blocks([*old.shape]))
                _write_blocks(files.target, name, old.dtype, old.shape, blocks)
            before, after = files.finish()
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error
    if source_hash is None:
        source_hash = before if changed else after
        remember_hash(source, source_hash, state)
    return source_hash, after


def row_blocks(shape: list[int], elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """Yield (first row, row after the last) of blocks of about `elements`.

    All are multiples of 64 rows except the last, which has at least 64 unless the tensor has fewer.
    """
    total, width = shape[0], max(prod(shape[1:]), 1)
    size = max(elements // width // ROWS, 1) * ROWS
    start = 0
    while start < total:
        stop = total if total - start < size + ROWS else start + size
        yield start, stop
        start = stop


def _read_blocks(source: HashingReader, entry: dict[str, Any]) -> Iterator[Tensor]:
    dtype, shape = FLOATS[entry["dtype"]], entry["shape"] or [1]
    row_bytes = prod(shape[1:]) * dtype.itemsize
    for start, stop in row_blocks(shape):
        data = source.read((stop - start) * row_bytes)
        yield torch.frombuffer(data, dtype=dtype).reshape(stop - start, *shape[1:])


def _extend_header(header: bytes, added: Mapping[str, AddedTensor]) -> bytes:
    """Return a file's header with these tensors after the others."""
    entries = json.loads(header[8:])
    end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
    for name, tensor in added.items():
        start, end = end, end + tensor.old.nbytes
        entry = {"dtype": tensor.old.dtype, "shape": tensor.old.shape, "data_offsets": [start, end]}
        entries[name] = entry
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _write_blocks(
    target: HashingWriter,
    name: str,
    dtype: str,
    shape: list[int] | tuple[int, ...],
    blocks: Iterator[Tensor],
) -> None:
    written = 0
    for block in blocks:
        if not _write(target, block.contiguous().view(-1), FLOATS[dtype]):
            raise UserError(
                f"{name} is not finite in {dtype}", where="merge", status=Exit.NON_FINITE
            )
        written += block.numel()
    assert written == prod(shape), name


def _write(target: HashingWriter, values: Tensor, dtype: torch.dtype) -> bool:
    """Round values and write them; return whether all are finite."""
    if not target.is_aligned_to(dtype.itemsize):  # an odd header, or an odd tensor before
        rounded = torch.empty(len(values), dtype=dtype)
        finite = round_into(values, rounded)
        target.write(rounded.view(torch.uint8).numpy().data)
        return finite
    finite, start = True, 0
    for space in target.spaces(len(values) * dtype.itemsize):
        rounded = torch.frombuffer(space, dtype=dtype)
        finite &= round_into(values[start : start + len(rounded)], rounded)
        start += len(rounded)
    return finite
