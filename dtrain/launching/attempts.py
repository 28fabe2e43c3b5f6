"""The list of attempts in a run folder: who tried when, where, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dtrain.core.errors import UserError
from dtrain.core.files import read_json, write_json
from dtrain.core.run_dir import RunDir


@dataclass
class Attempt:
    """One start of a job.

    Attributes:
        number: counted over the run folder's whole life, from 1.
        restart: how often Slurm has requeued the job.
        progress: the newest checkpoint of each stage when it began.
        outcome: one word; empty while it runs.
    """

    number: int
    job: str
    restart: int
    nodes: list[str]
    log: str
    started: float
    progress: dict[str, str] = field(default_factory=dict)
    ended: float | None = None
    outcome: str = ""
    because: str = ""
    action: str = ""


def attempts_of(run: Path) -> list[Attempt]:
    """The attempts recorded in a run folder, oldest first."""
    path = RunDir(run).attempts
    if not path.exists():
        return []
    try:
        return [Attempt(**record) for record in read_json(path)]
    except TypeError as error:
        raise UserError(f"is not a list of attempts: {error}", where=str(path)) from error


def write_attempts(run: Path, attempts: Sequence[Attempt]) -> None:
    """Replace the list."""
    write_json(RunDir(run).attempts, [asdict(attempt) for attempt in attempts])


def close_lost(attempts: Sequence[Attempt]) -> None:
    """Attempts that never came to their end were taken by a dead node or a kill."""
    for attempt in attempts:
        if attempt.ended is None:
            attempt.ended, attempt.outcome = time.time(), "lost"
            attempt.because = "ended with its node, or was killed"


def failures_in_a_row(attempts: Sequence[Attempt], job: str, progress: dict[str, str]) -> int:
    """Attempts of a job in vain, counted back from the newest, that began at this very progress.

    A preemption is nobody's fault and does not count.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.job != job or attempt.progress != progress or attempt.ended is None:
            break
        if attempt.outcome in ("hang", "crashed", "lost", "lost a worker", "warned"):
            count += 1
    return count
