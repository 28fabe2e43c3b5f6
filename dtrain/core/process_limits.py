"""The limits that a shell or a batch system sets on processes: open files, addresses."""

from __future__ import annotations

import errno
import resource
from contextlib import suppress

from dtrain.core.errors import UserError
from dtrain.core.units import size

MIN_OPEN_FILES = 64  # a rank of a small run has 40 open at once
MIN_ADDRESSES = 2 << 30  # bytes; torch reserves 1.8 GiB before the first weight
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)


def check_process_limits() -> None:
    """Raise the limit of open files as far as this process may, and check what is left.

    Raises:
        UserError: no run fits into a limit.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES:
        raise _too_many_files(files)
    addresses = address_limit()
    if addresses is not None and addresses < MIN_ADDRESSES:
        message = (
            f"a process may reserve {size(addresses)} of memory at most; torch alone needs "
            f"{size(MIN_ADDRESSES)}"
        )
        raise UserError(message, where="ulimit -v", fix="ulimit -v unlimited")


def address_limit() -> int | None:
    """Bytes of addresses that this process may reserve; None without a limit."""
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if addresses == resource.RLIM_INFINITY else addresses


def too_many_files(error: BaseException) -> UserError | None:
    """The error for a person where the limit of open files caused this one; None for others."""
    text, number = str(error), getattr(error, "errno", None)
    if number not in _TOO_MANY_FILES and "Too many open files" not in text:
        return None
    return _too_many_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _too_many_files(limit: int) -> UserError:
    message = f"too many open files: this process may open {limit}"
    return UserError(message, where="ulimit -n", fix="ulimit -n 4096, then the same command again")
