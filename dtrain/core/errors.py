"""Errors for the person at the terminal, and the exit statuses a job script can act on."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of every dtrain process."""

    FINISHED = 0
    CRASHED = 1  # a defect of ours or of the machine: there is a traceback
    USER_ERROR = 2  # wrong recipe, data or model: another try cannot help
    NON_FINITE = 3  # loss or gradients stayed NaN or infinite: another try cannot help
    OUT_OF_MEMORY = 4  # another try cannot help
    HANG = 5  # a rank did not reach its step: another try can help
    INTERRUPTED = 75  # stopped after saving (EX_TEMPFAIL): start again to go on


class UserError(Exception):
    """Something the reader can mend: what is wrong, where it stands, what to do.

    Args:
        what: the fault, in one sentence.
        where: file and line, or key, or both.
        fix: what to do about it.
        status: exit status of the process.
    """

    def __init__(
        self, what: str, *, where: str = "", fix: str = "", status: Exit = Exit.USER_ERROR
    ) -> None:
        self.what, self.where, self.fix, self.status = what, where, fix, status
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n    → {self.fix}" if self.fix else head

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.where, self.fix, self.status)


def _rebuild(what: str, where: str, fix: str, status: Exit) -> UserError:
    return UserError(what, where=where, fix=fix, status=status)


class EmptyData(UserError):
    """Data without a row, or without a token to learn."""


class Problems(UserError):
    """Several faults, told all at once."""

    def __init__(self, problems: list[UserError]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(p) for p in problems))

    def __reduce__(self) -> tuple[object, ...]:
        return Problems, (self.problems,)
