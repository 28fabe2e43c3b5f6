"""Who may have written what is read: nobody but this user and root."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dtrain.core.errors import UserError


class Untrusted(UserError):
    """What must not be used, nor passed over in silence: a person has to look."""


def own_folder(path: Path) -> Path:
    """The path, if it is a folder (no link) that only this user can write to.

    Raises:
        UserError: it is missing.
        Untrusted: a link, of a foreign owner, or writable by anyone.
    """
    _check_owner(path, stat.S_IFDIR)
    return path


def own_file(path: Path) -> Path:
    """The path, if it is a plain file (no link) that only this user can write to.

    Raises:
        UserError: it is missing.
        Untrusted: a link, of a foreign owner, or writable by anyone.
    """
    _check_owner(path, stat.S_IFREG)
    return path


def _check_owner(path: Path, sort: int) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if stat.S_IFMT(found.st_mode) != sort:
        raise Untrusted("is a link, or of the wrong sort", where=str(path))
    if found.st_uid not in (os.geteuid(), 0):
        raise Untrusted(
            f"belongs to user {found.st_uid}, not to you",
            where=str(path),
            fix="if you trust its content, make it yours with chown -R",
        )
    if found.st_mode & stat.S_IWOTH:
        raise Untrusted(
            "anyone may write to it", where=str(path), fix="if you trust its content: chmod -R o-w"
        )
