"""Pieces of a work that several processes share, on one node or many: nobody does one twice."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


class Claims:
    """Locks on the numbers 0, 1, …: bytes of one file, which the kernel frees when a process dies.

    POSIX record locks work over NFS and the parallel file systems of clusters. They belong to the
    process: use one `Claims` of a file in a process, made after any fork.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, number: int, *, wait: bool = False, shared: bool = False) -> bool:
        """Claim a number; without `wait`, return False at once if another process holds it.

        Args:
            shared: with all others who claim it so.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind | (0 if wait else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            if wait or error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True

    def give_back(self, number: int) -> None:
        """Give a claim back."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def is_there(self) -> bool:
        """Whether the file is still what others find at its path."""
        there = os.fstat(self._file)
        return self._path.exists() and os.path.samestat(there, self._path.stat())

    def close(self) -> None:
        """Give all claims back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
