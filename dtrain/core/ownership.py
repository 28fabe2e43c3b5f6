"""Checks that only this user and root can have written what is read, and files opened in place.

Who can write into a folder, or packs one that is unpacked here, can plant links in it: a file of a
known name that is opened for writing would lead into the home folder.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from dtrain.core.errors import UserError


class Untrusted(UserError):
    """Something that must be neither used nor silently skipped: a person has to decide."""


def check_own_folder(path: Path) -> Path:
    """Return the path if it is a folder (no symlink) that only this user can write to.

    Raises:
        UserError: it is missing.
        Untrusted: a symlink, owned by another user, or writable by anyone.
    """
    _check_owner(path, stat.S_IFDIR)
    return path


def check_own_file(path: Path) -> Path:
    """Return the path if it is a regular file (no symlink) that only this user can write to.

    Raises:
        UserError: it is missing.
        Untrusted: a symlink, owned by another user, or writable by anyone.
    """
    _check_owner(path, stat.S_IFREG)
    return path


def make_private_folder(path: Path) -> Path:
    """Create a folder, and let only this user open it.

    Raises:
        Untrusted: it is a symlink, belongs to another user, or anyone could write to it until now.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_own_folder(path).chmod(0o700)
    return path


def keep_private() -> None:
    """From now on only this user can open what this process, or one that it starts, creates."""
    os.umask(0o077)


def share_with_group(folder: Path, parent: Path) -> None:
    """Let the group read a folder and what is in it, if it may read `parent`, where it belongs.

    Files that have other names elsewhere keep their modes.
    """
    is_shared = _can_group_read(parent, folder)
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        with suppress(OSError):  # a file system without modes must not end a finished training
            if stat.S_ISDIR(status.st_mode):
                path.chmod(status.st_mode & stat.S_ISGID | (0o750 if is_shared else 0o700))
            elif stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                path.chmod(0o640 if is_shared else 0o600)


def _can_group_read(parent: Path, folder: Path) -> bool:
    status = parent.stat()
    return status.st_mode & 0o050 == 0o050 and status.st_gid == folder.stat().st_gid


def open_in_place(path: Path, flags: int, mode: int = 0o600, *, any_owner: bool = False) -> int:
    """Open a file for writing under its final name; a link is not followed.

    What is not written by `write_atomic`, or under a random name, is opened here.

    Args:
        path: of the file; its folder is trusted.
        flags: of `os.open`.
        mode: if it is created.
        any_owner: another user's file will do.

    Returns:
        A file descriptor that a program started by this process does not inherit.

    Raises:
        OSError: it cannot be opened.
        Untrusted: it is a link, has other names, is not a regular file or is another user's.
    """
    # O_TRUNC comes after the checks; without O_NONBLOCK a planted pipe would wait for a reader.
    careful = (flags & ~os.O_TRUNC) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        file = os.open(path, careful, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # ENXIO: a pipe
            raise _planted(path) from error
        raise
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise _planted(path)
        if not any_owner and status.st_uid not in (os.geteuid(), 0):
            raise Untrusted(f"belongs to user {status.st_uid}, not to you", where=str(path))
        if flags & os.O_TRUNC:
            os.ftruncate(file, 0)
    except BaseException:
        os.close(file)
        raise
    return file


def check_keeps_owners(folder: Path) -> None:
    """Check that a folder in which anyone may write lets nobody replace what is another's.

    Raises:
        Untrusted: it has no sticky bit, unlike /tmp.
    """
    mode = folder.stat().st_mode if folder.exists() else 0
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        message, fix = "anyone may replace what is in it", "choose another folder, or: chmod +t"
        raise Untrusted(message, where=str(folder), fix=fix)


def check_no_link(path: Path) -> Path:
    """Return the path if no symlink is there, dangling or not.

    Raises:
        Untrusted: there is one.
    """
    if path.is_symlink():
        raise _planted(path)
    return path


def _planted(path: Path) -> Untrusted:
    message = "is a link, has another name elsewhere, or is not a regular file"
    return Untrusted(message, where=str(path), fix="remove it")


def _check_owner(path: Path, file_type: int) -> None:
    try:
        status = path.lstat()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if stat.S_IFMT(status.st_mode) != file_type:
        expected = "folder" if file_type == stat.S_IFDIR else "file"
        raise Untrusted(f"is a symlink or not a regular {expected}", where=str(path))
    if status.st_uid not in (os.geteuid(), 0):
        raise Untrusted(
            f"belongs to user {status.st_uid}, not to you",
            where=str(path),
            fix="if you trust its content, make it yours with chown -R",
        )
    if status.st_mode & stat.S_IWOTH:
        raise Untrusted(
            "anyone may write to it", where=str(path), fix="if you trust its content: chmod -R o-w"
        )
