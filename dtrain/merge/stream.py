"""A safetensors file rewritten tensor by tensor, one block of rows at a time.

Names, shapes and dtypes stay, so the header stays byte for byte. Tensors that do not change are
copied as bytes, whatever their dtype; of those that change, one block of rows is in memory.

Hashing and waiting for the disk are most of a merge's work, so a file keeps up to four threads
busy: one reads and computes, one hashes what was read, one hashes what is new, one writes. They
pass each other a few blocks of memory that are reused: allocating new memory would cost more than
all the work done in it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import set_direct_io, write_all
from dtrain.core.hash_cache import file_state, lookup_hash, remember_hash
from dtrain.core.log import Meter
from dtrain.core.ownership import open_in_place
from dtrain.core.weight_files import read_header
from dtrain.merge.base_tensors import FLOATS
from dtrain.models.kernels.merge_rounding import round_into
from dtrain.models.stored_tensors import DecodedTensor, StoredTensor, row_blocks

# Blocks of rows as stored → the same blocks with new values in any float dtype; all, in order.
# A block's memory is reused soon: copy the blocks to hold several at once.
ChangeBlocks = Callable[[Iterator[Tensor]], Iterator[Tensor]]


@dataclass(frozen=True)
class AddedTensor:
    """A tensor appended to its file: an existing one, and how it changes."""

    old: StoredTensor | DecodedTensor
    change: ChangeBlocks


def rewrite_file(
    source: Path,
    target: Path,
    changes: Mapping[str, ChangeBlocks],
    bar: Meter,
    added: Mapping[str, AddedTensor] | None = None,
    dropped: Collection[str] = (),
) -> tuple[str, str]:
    """Write `source` to `target` with some tensors changed, each rounded once to its own dtype.

    Args:
        target: replaced if it exists; on the disk when this returns.
        bar: advanced by one for each tensor of the source.
        added: by name; those made from a tensor of another file are skipped.
        dropped: names of tensors that are left out.

    Returns:
        Hashes of the source and of the target.

    Raises:
        UserError: a new value is not finite, or the source changes while it is read.
    """
    entries, header = read_header(source)
    state, source_hash = file_state(source), lookup_hash(source)
    here = {name: tensor for name, tensor in (added or {}).items() if tensor.old.path == source}
    new_layout = bool(here) or not entries.keys().isdisjoint(dropped)
    changed = new_layout or not changes.keys().isdisjoint(entries)
    try:
        with HashingCopy(source, target, changed and source_hash is None) as files:
            files.source.read(len(header))
            new_header = _new_header(header, dropped, here) if new_layout else header
            files.target.write(memoryview(new_header))
            for name, entry in entries.items():
                start, stop = entry["data_offsets"]
                if name in dropped:
                    files.source.skip(stop - start)
                elif name in changes:
                    blocks = changes[name](_read_blocks(files.source, entry))
                    _write_blocks(files.target, name, entry["dtype"], entry["shape"], blocks)
                else:
                    files.copy(stop - start)
                bar.advance()
            for name, tensor in here.items():
                old = tensor.old
                blocks = tensor.change(old.rows(*rows) for rows in row_blocks(old.shape))
                _write_blocks(files.target, name, old.dtype, old.shape, blocks)
            before, after = files.finish()
    except EOFError as error:
        raise UserError("changed while it was read", where=str(source)) from error
    if source_hash is None:
        source_hash = before if changed else after
        remember_hash(source, source_hash, state)
    elif file_state(source) != state:  # the hash is not of what was read
        raise UserError("changed while it was read", where=str(source))
    return source_hash, after


def _read_blocks(source: HashingReader, entry: dict[str, Any]) -> Iterator[Tensor]:
    dtype, shape = FLOATS[entry["dtype"]], entry["shape"] or [1]
    row_bytes = prod(shape[1:]) * dtype.itemsize
    for start, stop in row_blocks(shape):
        data = source.read((stop - start) * row_bytes)
        yield torch.frombuffer(data, dtype=dtype).reshape(stop - start, *shape[1:])


def _new_header(header: bytes, dropped: Collection[str], added: Mapping[str, AddedTensor]) -> bytes:
    """Return a file's header without some tensors, and with others after the rest."""
    old = json.loads(header[8:])
    entries = {"__metadata__": old.pop("__metadata__")} if "__metadata__" in old else {}
    kept = sorted((n for n in old if n not in dropped), key=lambda n: old[n]["data_offsets"])
    end = 0
    for name in kept:
        start, stop = old[name]["data_offsets"]
        entries[name] = old[name] | {"data_offsets": [end, end := end + stop - start]}
    for name, tensor in added.items():
        offsets = [end, end := end + tensor.old.nbytes]
        entries[name] = {
            "dtype": tensor.old.dtype, "shape": tensor.old.shape, "data_offsets": offsets
        }  # fmt: skip
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


READ_AHEAD_BYTES = 8 << 20
WRITE_BYTES = 2 << 20  # per write, starting at a page boundary
BUFFERS = 3  # one is filled, one hashed, one written


class Buffer:
    """Memory for a block; it is reused once every task that uses the last block is done."""

    def __init__(self, size: int = 0) -> None:
        self._memory = memoryview(mmap.mmap(-1, size) if size else b"")
        self.users: list[Future[Any]] = []

    def claim(self, size: int) -> memoryview:
        """Return `size` bytes of undefined content.

        Raises:
            Exception: whatever a task on the previous block raised.
        """
        while self.users:
            self.users.pop().result()
        if len(self._memory) < size:
            self._memory = memoryview(mmap.mmap(-1, size))
        return self._memory[:size]


class HashingReader:
    """A file that is read from beginning to end.

    Args:
        hashed: compute its hash.
    """

    def __init__(self, path: Path, hashed: bool) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._hashed, self._hasher = hashed, blake3()
        self._pool = ThreadPoolExecutor(1)
        self._buffers = cycle([Buffer(), Buffer()])
        self._position = self._requested = 0

    def read(self, size: int) -> memoryview:
        """Return exactly `size` bytes, valid until the next call but one.

        Raises:
            EOFError: the file has fewer bytes left.
        """
        buffer = next(self._buffers)
        block = buffer.claim(size)
        self.read_into(block, buffer)
        return block

    def read_into(self, block: memoryview, buffer: Buffer) -> None:
        """Fill `block`, a slice of `buffer`.

        Raises:
            EOFError: the file has fewer bytes left.
        """
        self._read_ahead(len(block))
        if self._file.readinto(block) != len(block):
            raise EOFError
        if self._hashed:
            buffer.users.append(self._pool.submit(self._hasher.update, block))

    def skip(self, size: int) -> None:
        """Read `size` bytes for the hash alone.

        Raises:
            EOFError: as `read`.
        """
        for start in range(0, size, READ_AHEAD_BYTES):
            self.read(min(size - start, READ_AHEAD_BYTES))

    def digest(self) -> str:
        """Return the hash of what was read, as hex; empty if it is not computed."""
        return str(self._pool.submit(self._hasher.hexdigest).result()) if self._hashed else ""

    def _read_ahead(self, size: int) -> None:
        self._position += size
        if self._position + READ_AHEAD_BYTES > self._requested:
            self._requested = self._position + 2 * READ_AHEAD_BYTES
            span = self._position, self._requested - self._position
            os.posix_fadvise(self._file.fileno(), *span, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()


class HashingWriter:
    """A file that is written from beginning to end, bypassing the page cache where possible.

    Args:
        path: replaced if it exists.

    Attributes:
        buffer: the one that is being filled.
    """

    def __init__(self, path: Path) -> None:
        self._handle = open_in_place(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        set_direct_io(self._handle, True)
        self._hash_pool, self._write_pool = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hasher = blake3()
        self._buffers = [Buffer(WRITE_BYTES) for _ in range(BUFFERS)]
        self._next = cycle(self._buffers)
        self._filled = 0
        self._start_block()

    def spaces(self, size: int) -> Iterator[memoryview]:
        """Yield memory of `size` bytes in one or more slices, each to be filled before the next."""
        while size:
            space = self._block[self._filled : self._filled + size]
            self._filled, size = self._filled + len(space), size - len(space)
            yield space
            if self._filled == WRITE_BYTES:
                self._flush()
                self._start_block()

    def is_aligned_to(self, size: int) -> bool:
        """Return whether no element of `size` bytes would span two slices of `spaces`."""
        return self._filled % size == 0

    def write(self, data: memoryview) -> None:
        """Write all of `data`, bytes."""
        for space in self.spaces(len(data)):
            space[:], data = data[: len(space)], data[len(space) :]

    def finish(self) -> str:
        """Wait until everything is on the disk; return the hash, as hex."""
        self._flush()
        for buffer in self._buffers:
            buffer.claim(0)
        os.fsync(self._handle)
        return str(self._hasher.hexdigest())

    def close(self) -> None:
        """Close the file, finished or not."""
        for pool in (self._hash_pool, self._write_pool):
            pool.shutdown(cancel_futures=True)
        os.close(self._handle)

    def _start_block(self) -> None:
        self.buffer = next(self._next)
        self._block, self._filled = self.buffer.claim(WRITE_BYTES), 0

    def _flush(self) -> None:
        block = self._block[: self._filled]
        self.buffer.users.append(self._hash_pool.submit(self._hasher.update, block))
        self.buffer.users.append(self._write_pool.submit(write_all, self._handle, block))


class HashingCopy:
    """A source file that is read while a target file is written.

    Args:
        hashed: compute the source's hash as well as the target's.
    """

    def __init__(self, source: Path, target: Path, hashed: bool) -> None:
        self.source, self.target = HashingReader(source, hashed), HashingWriter(target)

    def copy(self, size: int) -> None:
        """Copy `size` bytes unchanged."""
        for space in self.target.spaces(size):
            self.source.read_into(space, self.target.buffer)

    def finish(self) -> tuple[str, str]:
        """Wait until everything is on the disk; return the hashes of source and target, as hex."""
        return self.source.digest(), self.target.finish()

    def __enter__(self) -> HashingCopy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.source.close()
        self.target.close()
