"""Writing past the page cache: new pages of it cost more than all else that is done to a file."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

BLOCK_BYTES = 1 << 22
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


class DirectFile:
    """A file that is written from its beginning to its end, for nobody to read soon.

    Args:
        path: replaced if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._room = memoryview(mmap.mmap(-1, BLOCK_BYTES))  # at a page, as O_DIRECT wants it
        self._filled = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        pass_cache(self._handle, True)

    def write(self, data: memoryview) -> None:
        """Take all of `data` (bytes); whole blocks go to the disk at once."""
        while len(data):
            count = min(len(data), BLOCK_BYTES - self._filled)
            self._room[self._filled : self._filled + count] = data[:count]
            self._filled, data = self._filled + count, data[count:]
            if self._filled == BLOCK_BYTES:
                self._flush()

    def finish(self) -> None:
        """All that was written is on the disk when this returns."""
        self._flush()
        os.fsync(self._handle)

    def _flush(self) -> None:
        write_all(self._handle, self._room[: self._filled])
        self._filled = 0

    def close(self) -> None:
        """Let go of the file, finished or not."""
        os.close(self._handle)


def write_all(handle: int, block: memoryview) -> None:
    """Write a block whole: the kernel may take less at a time, and does when the disk fills up."""
    while len(block):
        try:
            block = block[os.write(handle, block) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(handle, fcntl.F_GETFL) & O_DIRECT:
                raise
            pass_cache(handle, False)  # the last block is no whole number of pages


def pass_cache(handle: int, wanted: bool) -> None:
    """Write from the process's memory to the disk, or no longer, where the file system can.

    The memory, and each write's length and place in the file, must be of whole pages.
    """
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    with suppress(OSError):  # tmpfs knows of nothing past the page cache
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | O_DIRECT if wanted else flags & ~O_DIRECT)
