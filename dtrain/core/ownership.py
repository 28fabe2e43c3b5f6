"""Checks that only this user and root can have written what is read."""

from __future__ import annotations

import os
import stat
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
