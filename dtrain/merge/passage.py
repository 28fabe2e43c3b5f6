"""Bytes on their way from one file to another, hashed on both sides by threads beside.

SHA-256 is most of a merge's work, so a file keeps three threads busy: one reads and computes, one
hashes what was read, one hashes and writes what is new. All work in a few blocks of memory that
are used over and over: new ones would cost more than what is done in them.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

from dtrain.core.direct import DirectFile
from dtrain.core.hashes import BLOCK_BYTES

AHEAD_BYTES = 8 << 20  # that the kernel is asked to have read already


class Room:
    """Memory for a block; given again when all that goes on with the last one is done."""

    def __init__(self) -> None:
        self._memory = bytearray()
        self.users: list[Future[Any]] = []

    def claim(self, size: int) -> memoryview:
        """`size` bytes of any content.

        Raises:
            Exception: of what went on with the block before.
        """
        while self.users:
            self.users.pop().result()
        if len(self._memory) < size:
            self._memory = bytearray(size)
        return memoryview(self._memory)[:size]


class Passage:
    """Reads one file and writes another, both from the beginning to the end.

    Args:
        target: replaced if it is there.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self._old = open(source, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._new = DirectFile(target)
        self._before = self._after = hashlib.sha256()
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._rooms = [Room() for _ in range(4)]  # two on each side: one is filled meanwhile
        self._inlet, self._outlet = cycle(self._rooms[:2]), cycle(self._rooms[2:])
        self._reading = self._rooms[0]
        self._at = self._asked = 0

    def part(self) -> None:
        """What is written need not be what is read any more."""
        if self._after is self._before:
            self._after = self._hasher.submit(self._before.copy).result()

    def read(self, size: int) -> memoryview:
        """Exactly `size` bytes, which stay what they are until the next but one is read.

        Raises:
            EOFError: there are no more.
        """
        self._reading = next(self._inlet)
        block = self._reading.claim(size)
        self._ask_ahead(size)
        if self._old.readinto(block) != size:
            raise EOFError
        self._reading.users.append(self._hasher.submit(self._before.update, block))
        return block

    def room(self, size: int) -> memoryview:
        """Memory of `size` bytes, to be filled and then written by `write_room`."""
        self._writing = next(self._outlet)
        return self._writing.claim(size)

    def write_room(self, data: memoryview) -> None:
        """Write what `room` gave."""
        self._write(data, self._writing)

    def copy(self, size: int) -> None:
        """Let `size` bytes pass as they are."""
        for at in range(0, size, BLOCK_BYTES):
            self._write(self.read(min(BLOCK_BYTES, size - at)), self._reading)

    def finish(self) -> tuple[str, str]:
        """All is on the disk; SHA-256 of what was read and of what was written, as hex."""
        for room in self._rooms:
            room.claim(0)
        self._writer.submit(self._new.finish).result()
        return self._before.hexdigest(), self._after.hexdigest()

    def _write(self, data: memoryview, room: Room) -> None:
        digest = None if self._after is self._before else self._after
        room.users.append(self._writer.submit(self._put, data, digest))

    def _put(self, data: memoryview, digest: Any) -> None:
        if digest is not None:
            digest.update(data)
        self._new.write(data)

    def _ask_ahead(self, size: int) -> None:
        self._at += size
        if self._at + AHEAD_BYTES > self._asked:
            self._asked = max(self._asked, self._at) + AHEAD_BYTES
            span = self._at, self._asked + AHEAD_BYTES - self._at
            os.posix_fadvise(self._old.fileno(), *span, os.POSIX_FADV_WILLNEED)

    def __enter__(self) -> Passage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._hasher, self._writer):
            pool.shutdown(cancel_futures=True)
        self._old.close()
        self._new.close()
