"""Writing past the page cache: new pages of it cost more than all else that is done to a file."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress

O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


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
