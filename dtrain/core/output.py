"""stdout and stderr that never raise, and that pass no text on that steers a terminal.

A terminal that was closed answers EIO, a pipe without a reader EPIPE, a full disk ENOSPC; a stream
that is not UTF-8 cannot encode every character. What cannot be written is dropped, and the next
write is tried again: a full disk may have room by then.

Keys, file names, rows and what a server says are other people's text. Printed as it is, an escape
sequence in it can hide, change or forge what stands on a terminal (CWE-150).
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import shutil
import sys
from contextlib import suppress
from textwrap import wrap
from typing import Any, TextIO

# Nobody is there to read: a normal end of a pipe into `head`, or of a session.
NO_READER = (errno.EPIPE, errno.EIO)

# C0 except tab and newline, DEL, C1, and characters that change the direction of text
# (Boucher and Anderson, arXiv:2111.00169).
_STEERING = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"
)
_RICH_CONTROL = re.compile(r"\r|\x1b\[[0-9;?]*[A-Za-z]|(" + _STEERING.pattern + ")")
_DELETE = 0x7F


def visible(text: str) -> str:
    """The text with symbols and escapes instead of what steers a terminal."""
    return _STEERING.sub(_symbol, text) if _STEERING.search(text) else text


def printable(text: str) -> str:
    """The text in one line, with a space instead of each character that cannot be printed."""
    return "".join(c if c.isprintable() else " " for c in text)


def _symbol(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 32:
        return chr(0x2400 + code)
    return "\u2421" if code == _DELETE else f"\\u{code:04x}"


def wrapped(text: str, stream: TextIO) -> str:
    """The text, with its lines broken between words if the stream is a terminal.

    In files lines stay whole, for grep.
    """
    return fit(text, shutil.get_terminal_size().columns) if stream.isatty() else text


def fit(text: str, columns: int) -> str:
    """The text, with its lines broken between words; a continuation is indented as its line."""
    return "\n".join(_wrap_line(line, columns) for line in text.split("\n"))


def _wrap_line(line: str, columns: int) -> str:
    if len(line) <= columns:
        return line
    indent = " " * (len(line) - len(line.lstrip(" ")))
    lines = wrap(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


class SafeText(io.TextIOWrapper):
    """A text stream that makes visible what would steer a terminal.

    Attributes:
        rich_proxied_file: what rich consoles write to: their colors pass, and `SafeConsole` in
            `dtrain/core/log.py` makes the text between them visible.
    """

    def write(self, text: str) -> int:
        """Write the text; return its length."""
        super().write(visible(text))
        return len(text)

    @property
    def rich_proxied_file(self) -> _RichText:
        """The same stream, for text with rich's colors."""
        return _RichText(self)


class _RichText:
    """A SafeText that passes on colors and what moves the cursor, and nothing else."""

    def __init__(self, stream: SafeText) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        shown = _RICH_CONTROL.sub(lambda x: _symbol(x) if x.group(1) else x.group(), text)
        return io.TextIOWrapper.write(self._stream, shown)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
    """Let sys.stdout and sys.stderr drop what they cannot write, and show what steers terminals.

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
    raw: Any = SafeOutput(descriptor)
    is_unbuffered = getattr(stream, "write_through", False)  # python -u, as in the ranks
    return SafeText(
        raw if is_unbuffered else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", True),
        write_through=is_unbuffered,
    )
