"""stdout and stderr that never raise: a closed terminal, a dead reader or a full disk ends no run.

A terminal that was closed answers EIO, a pipe without a reader EPIPE, a full disk ENOSPC; a stream
that is not UTF-8 cannot encode every character. What cannot be written is dropped, and the next
write is tried again: a full disk may have room by then.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

# Nobody is there to read: a normal end of a pipe into `head`, or of a session.
NO_READER = (errno.EPIPE, errno.EIO)


class SafeOutput(io.RawIOBase):
    """Writes to a file descriptor that never fail.

    Attributes:
        error: the last error of a write, if there was one.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is written to."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether this is a terminal that is still open."""
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        """Write what can be written; return the size of all."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                with suppress(OSError, ValueError):  # ValueError: above select's limit
                    select.select([], [self._descriptor], [], 1.0)
            except OSError as error:
                self.error = error
                break
        return size


def protect_output() -> None:
    """Let sys.stdout and sys.stderr drop what they cannot write.

    A stream that was closed at the start becomes /dev/null: a file that is opened later would take
    its number, and what libraries print would go into that file.
    """
    for descriptor, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        _open_if_closed(descriptor)
        stream = getattr(sys, name)
        # A test's or a notebook's replacement stays.
        if descriptor and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _protected(descriptor, stream))


def lost_output() -> OSError | None:
    """The error that made stdout lose text, unless only its reader has gone."""
    with suppress(AttributeError, ValueError):
        sys.stdout.flush()
        buffer: Any = sys.stdout.buffer
        error: OSError | None = getattr(getattr(buffer, "raw", buffer), "error", None)
        return error if error is not None and error.errno not in NO_READER else None
    return None


def _open_if_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _protected(descriptor: int, stream: TextIO | None) -> TextIO:
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: it was closed
        stream.flush()  # type: ignore[union-attr]
    raw = SafeOutput(descriptor)
    is_unbuffered = getattr(stream, "write_through", False)  # python -u, as in the ranks
    return io.TextIOWrapper(
        raw if is_unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=is_unbuffered,
    )
