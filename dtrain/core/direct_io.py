"""Writes that bypass the page cache: new cache pages cost more than everything else in a write."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress

O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


def write_all(handle: int, block: memoryview) -> None:
    """Write a whole block: the kernel may accept only a part, and does when the disk fills up."""
    while len(block):
        try:
            block = block[os.write(handle, block) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not fcntl.fcntl(handle, fcntl.F_GETFL) & O_DIRECT:
                raise
            set_direct_io(handle, False)  # the last block is not a whole number of pages


def set_direct_io(handle: int, enabled: bool) -> None:
    """Turn direct I/O on or off, where the file system supports it.

    Memory address, length and file offset of each write must then be multiples of a page.
    """
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    with suppress(OSError):  # tmpfs has no direct I/O
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | O_DIRECT if enabled else flags & ~O_DIRECT)
