"""Copying bytes from one file to another, hashed on both sides by background threads.

Hashing and waiting for the disk are most of a merge's work, so a file keeps up to four threads
busy: one reads and computes, one hashes what was read, one hashes what is new, one writes. They
pass each other a few blocks of memory that are reused: allocating new memory would cost more than
all the work done in it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

from blake3 import blake3

from dtrain.core.direct_io import set_direct_io, write_all

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
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
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
