"""What the operating system refuses, in the words of the person who can change it.

A full disk, a folder without permission, a file system that is read-only or has no locks: none of
them is a bug, so a traceback would hide the path, and what to do about it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from dtrain.core.cache_paths import CACHE_VARIABLE, CHOOSE_CACHE, is_in_cache
from dtrain.core.errors import UserError
from dtrain.core.process_limits import too_many_files

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# How the Rust of safetensors and tokenizers names an error of the system.
_CODE = re.compile(r"\b(?:code: |os error )(\d+)\b")


@contextmanager
def explained_os_errors() -> Iterator[None]:
    """Raise a UserError in place of an error of the system that a person can fix."""
    try:
        yield
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        raise explained from error


def explain(error: BaseException) -> UserError | None:
    """An error of the system as a UserError; None for any other error."""
    number, path = _number(error), str(getattr(error, "filename", None) or "")
    text = os.strerror(number) if number else ""
    if limit := too_many_files(error):
        return limit
    if number in NO_SPACE:
        return UserError(text, where=path, fix="free some space, then start it again to resume")
    if number == errno.EFBIG:
        return UserError(text, where=path, fix="ulimit -f unlimited, then the same command again")
    if number in NO_LOCKS:
        return no_locks(path)
    if number in REFUSED and path:
        is_cache = is_in_cache(path)
        where = f"{path} (the cache)" if is_cache else path
        fix = CHOOSE_CACHE if is_cache else "change its permissions, or choose another folder"
        return UserError(text, where=where, fix=fix)
    return None


def no_locks(path: str) -> UserError:
    """The error for a file system on which files cannot be locked."""
    key = CACHE_VARIABLE if path and is_in_cache(path) else "output.folder"
    fix = f"choose a folder on another file system ({key}), or mount this one with locks"
    return UserError(
        "this file system has no file locks", where=path, fix=f"{fix} (Lustre: -o flock)"
    )


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _CODE.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else None
