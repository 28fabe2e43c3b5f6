"""Bytes on their way from one file to another, hashed on both sides by threads beside.

Hashing is most of a merge's work and the disk takes its time, so a file keeps up to four threads
busy: one reads and computes, one hashes what was read, one what is new, one writes. They hand each
other a few blocks of memory that are used over and over: new memory would cost more than all that
is done in it.
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

from dtrain.core.direct_io import pass_cache, write_all

AHEAD_BYTES = 8 << 20  # that the kernel is asked to have read already
WRITTEN_BYTES = 2 << 20  # at once, from a page's beginning
ROOMS = 3  # one is filled, one hashed, one written


class Buffer:
    """Memory for a block; given again when all that goes on with the last one is done."""

    def __init__(self, size: int = 0) -> None:
        self._memory = memoryview(mmap.mmap(-1, size) if size else b"")
        self.users: list[Future[Any]] = []

    def claim(self, size: int) -> memoryview:
        """`size` bytes of any content.

        Raises:
            Exception: of what went on with the block before.
        """
        while self.users:
            self.users.pop().result()
        if len(self._memory) < size:
            self._memory = memoryview(mmap.mmap(-1, size))
        return self._memory[:size]


class Source:
    """A file that is read from the beginning to the end.

    Args:
        hashed: whether its hash is wanted.
    """

    def __init__(self, path: Path, hashed: bool) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._hashed, self._digest = hashed, blake3()
        self._pool = ThreadPoolExecutor(1)
        self._next = cycle([Buffer(), Buffer()])
        self._at = self._asked = 0

    def read(self, size: int) -> memoryview:
        """Exactly `size` bytes, which stay what they are until the next but one are read.

        Raises:
            EOFError: there are no more.
        """
        room = next(self._next)
        block = room.claim(size)
        self.read_into(block, room)
        return block

    def read_into(self, block: memoryview, room: Buffer) -> None:
        """Fill `block`, which is a part of `room`.

        Raises:
            EOFError: there are not as many bytes any more.
        """
        self._ask_ahead(len(block))
        if self._file.readinto(block) != len(block):
            raise EOFError
        if self._hashed:
            room.users.append(self._pool.submit(self._digest.update, block))

    def digest(self) -> str:
        """Of what was read, as hex; empty if it is not wanted."""
        return self._pool.submit(self._digest.hexdigest).result() if self._hashed else ""

    def _ask_ahead(self, size: int) -> None:
        self._at += size
        if self._at + AHEAD_BYTES > self._asked:
            self._asked = self._at + 2 * AHEAD_BYTES
            span = self._at, self._asked - self._at
            os.posix_fadvise(self._file.fileno(), *span, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Let go of the file."""
        self._pool.shutdown(cancel_futures=True)
        self._file.close()


class Target:
    """A file that is written from the beginning to the end, past the page cache where that can be.

    Args:
        path: replaced if it is there.

    Attributes:
        room: what is being filled.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        pass_cache(self._handle, True)
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._digest = blake3()
        self._rooms = [Buffer(WRITTEN_BYTES) for _ in range(ROOMS)]
        self._next = cycle(self._rooms)
        self._filled = 0
        self._take()

    def spaces(self, size: int) -> Iterator[memoryview]:
        """Memory of `size` bytes in one or more pieces, each to be filled before the next."""
        while size:
            space = self._block[self._filled : self._filled + size]
            self._filled, size = self._filled + len(space), size - len(space)
            yield space
            if self._filled == WRITTEN_BYTES:
                self._give()
                self._take()

    def is_at_multiple(self, size: int) -> bool:
        """Whether elements of `size` bytes written now lie whole in the pieces of `spaces`."""
        return self._filled % size == 0

    def write(self, data: memoryview) -> None:
        """Take all of `data`, bytes."""
        for space in self.spaces(len(data)):
            space[:], data = data[: len(space)], data[len(space) :]

    def finish(self) -> str:
        """All is on the disk; its hash, as hex."""
        self._give()
        for room in self._rooms:
            room.claim(0)
        os.fsync(self._handle)
        return self._digest.hexdigest()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        for pool in (self._hasher, self._writer):
            pool.shutdown(cancel_futures=True)
        os.close(self._handle)

    def _take(self) -> None:
        self.room = next(self._next)
        self._block, self._filled = self.room.claim(WRITTEN_BYTES), 0

    def _give(self) -> None:
        block = self._block[: self._filled]
        self.room.users.append(self._hasher.submit(self._digest.update, block))
        self.room.users.append(self._writer.submit(write_all, self._handle, block))


class HashingCopy:
    """One file on its way to another.

    Args:
        hashed: whether the source's hash is wanted too.
    """

    def __init__(self, source: Path, target: Path, hashed: bool) -> None:
        self.old, self.new = Source(source, hashed), Target(target)

    def copy(self, size: int) -> None:
        """Let `size` bytes pass as they are."""
        for space in self.new.spaces(size):
            self.old.read_into(space, self.new.room)

    def finish(self) -> tuple[str, str]:
        """All is on the disk; hashes of what was read, if wanted, and written, as hex."""
        return self.old.digest(), self.new.finish()

    def __enter__(self) -> HashingCopy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.old.close()
        self.new.close()
