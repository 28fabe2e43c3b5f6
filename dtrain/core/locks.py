"""File locks that the kernel releases when their process dies, however it dies.

The library `filelock` has no byte ranges, cannot keep a lock across `execve`, and does not record
who holds it, so the calls of `fcntl` stand here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from dtrain.core.errors import UserError
from dtrain.core.os_errors import NO_LOCKS, no_locks
from dtrain.core.ownership import open_in_place

LOCK_FILE = ".lock"
HOLDER_CHARACTERS = 200
_HOLDER = re.compile(r"process (\d+) on (.+)")
_HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)


class FolderLock:
    """An exclusive lock on a folder: `flock` on its file `.lock`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file = -1

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the lock; without `wait`, return False at once if another process holds it.

        Raises:
            OSError: the lock file cannot be opened.
            UserError: the lock file is not a regular file, or the file system has no locks.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open_lock_file(self.path, or_read_only=True)
        try:
            if not lock_file(file, self.path, wait=wait):
                os.close(file)
                return False
        except BaseException:
            os.close(file)
            raise
        with suppress(OSError):  # the file of another user can be locked, not written
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._file = file
        return True

    def keep_after_exec(self) -> None:
        """Let the program that this process becomes hold the lock until it ends."""
        assert self._file >= 0, "not acquired"
        os.set_inheritable(self._file, True)

    def holder(self) -> str:
        """Who holds the lock, for a message."""
        text = ""
        with suppress(OSError), open(self.path, encoding="utf-8", errors="replace") as file:
            text = file.read(HOLDER_CHARACTERS).strip()
        return text if text.isprintable() and text else "another process"

    def is_held(self) -> bool:
        """Whether a process holds the lock; it need not be of this machine."""
        try:
            file = open_in_place(self.path, os.O_RDONLY, any_owner=True)
        except (OSError, UserError):
            return False
        try:  # shared, so that two processes that ask do not see each other
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _HELD_ELSEWHERE
        finally:
            os.close(file)
        return False

    def holder_here(self) -> int | None:
        """Id of the process of this machine that holds the lock; None if there is none."""
        match = _HOLDER.fullmatch(self.holder())
        if not self.is_held() or match is None or match[2] != socket.gethostname():
            return None
        with suppress(OSError):  # another user's process, or one that has ended
            for file in Path(f"/proc/{match[1]}/fd").iterdir():
                with suppress(OSError):  # closed since it was listed
                    if file.samefile(self.path):
                        return int(match[1])
        return None

    def release(self) -> None:
        """Release the lock; releasing it twice does no harm."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> FolderLock:
        self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ShardLocks:
    """Locks on the indices 0, 1, … for work that several processes share, on one node or many.

    Each index is a byte of one file. POSIX record locks work over NFS and the parallel file systems
    of clusters. They belong to the process, so use one `ShardLocks` of a file in a process, built
    after any fork.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        self._file = open_lock_file(path)

    def acquire(self, index: int, *, wait: bool = False, shared: bool = False) -> bool:
        """Lock an index; without `wait`, return False at once if another process holds it.

        Args:
            index: to lock.
            wait: until it is free.
            shared: allow other processes to hold it at the same time, if they share it too.

        Raises:
            UserError: the file system has no locks.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self._file, kind | (0 if wait else fcntl.LOCK_NB), 1, index)
        except OSError as error:
            if not wait and error.errno in _HELD_ELSEWHERE:
                return False
            raise _explained(error, self._path) from error
        return True

    def release(self, index: int) -> None:
        """Release an index."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, index)

    def is_current(self) -> bool:
        """Whether other processes still find this file at its path."""
        return self._path.exists() and os.path.samestat(os.fstat(self._file), self._path.stat())

    def close(self) -> None:
        """Release all indices."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def open_lock_file(path: Path, *, or_read_only: bool = False) -> int:
    """Open a lock file, creating it if needed; a symlink is not followed.

    Args:
        path: of the lock file.
        or_read_only: take another user's file too, as in a cache that several users share; `flock`
            needs no more.

    Returns:
        A file descriptor that a program started by this process does not inherit.

    Raises:
        OSError: it cannot be opened.
        UserError: it is a symlink, has other names, or is not a regular file.
    """
    try:
        return open_in_place(path, os.O_CREAT | os.O_RDWR, 0o600, any_owner=True)
    except PermissionError:
        if not or_read_only:
            raise
        return open_in_place(path, os.O_RDONLY, any_owner=True)


def lock_file(file: int | IO[bytes], path: Path, *, wait: bool = False) -> bool:
    """`flock` an open file; without `wait`, return False if another process holds it.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not wait and error.errno in _HELD_ELSEWHERE:
            return False
        raise _explained(error, path) from error
    return True


def check_record_locks(folder: Path) -> None:
    """Check that `ShardLocks` will work in a folder; some file systems know `flock` alone.

    Raises:
        OSError: the folder cannot be written to.
        UserError: the file system has no such locks.
    """
    with tempfile.NamedTemporaryFile(prefix=".locks.", dir=folder) as file:
        locks = ShardLocks(Path(file.name))
        try:
            locks.acquire(0)
        finally:
            locks.close()


def _explained(error: OSError, path: Path) -> OSError | UserError:
    return no_locks(str(path)) if error.errno in NO_LOCKS else error
