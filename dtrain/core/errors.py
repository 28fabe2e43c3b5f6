"""Errors for the person at the terminal, and the exit statuses that a job script can act on."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum

from dtrain.core.output import visible


class Exit(IntEnum):
    """Exit statuses of every dtrain process."""

    FINISHED = 0
    CRASHED = 1  # a bug or a machine failure: there is a traceback
    USER_ERROR = 2  # wrong recipe, data or model: a retry cannot help
    NON_FINITE = 3  # loss or gradients stayed NaN or infinite: a retry cannot help
    OUT_OF_MEMORY = 4  # a retry cannot help
    HANG = 5  # a rank did not reach its step: a retry can help
    GATE_FAILED = 6  # a stage made an evaluation set worse than allowed: a retry cannot help
    DIVERGED = 7  # the loss rose far above its start: a retry cannot help
    INTERRUPTED = 75  # stopped after saving (EX_TEMPFAIL): start again to continue
    CTRL_C = 130  # ended before the training, as a shell reports SIGINT


class UserError(Exception):
    """An error that the user can fix: what is wrong, where, and what to do.

    Args:
        message: what is wrong, in one sentence.
        where: file and line, key, or both.
        fix: what to do about it.
        status: exit status of the process.
    """

    def __init__(
        self, message: str, *, where: str = "", fix: str = "", status: Exit = Exit.USER_ERROR
    ) -> None:
        self.message, self.where, self.fix, self.status = message, where, fix, status
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return visible(f"{head}\n    → {self.fix}" if self.fix else head)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.message, self.where, self.fix, self.status)


def nearest_name(name: str, known: Iterable[str], otherwise: str = "", most: int = 1) -> str:
    """The fix for an unknown name: up to `most` similar names that are known, else `otherwise`."""
    close = get_close_matches(name, list(known), n=most)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def first_line(error: BaseException) -> str:
    """The first line of an error's message, and the next if it ends in a colon; else its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]


def _rebuild(message: str, where: str, fix: str, status: Exit) -> UserError:
    """Unpickle a UserError, whose fields after the first are keyword-only."""
    return UserError(message, where=where, fix=fix, status=status)


class EmptyDataError(UserError):
    """Data without a row, or without a trainable token."""


class UserErrors(UserError):
    """Several errors, reported together."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors = errors
        super().__init__("\n".join(str(error) for error in errors))

    def __reduce__(self) -> tuple[object, ...]:
        return UserErrors, (self.errors,)
