"""The attempts of a run's jobs: when and where each one ran, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Required

from typing_extensions import TypedDict

from dtrain.core.errors import UserError
from dtrain.core.file_types import Count, JobId, Seconds
from dtrain.core.files import read_json, write_json
from dtrain.core.processes import output_file
from dtrain.core.run_dir import RunDir
from dtrain.core.units import duration
from dtrain.launching import slurm
from dtrain.launching.requeue_policy import (
    FAILED_OUTCOMES,
    AttemptResult,
    Decision,
    RetryLimits,
    decide,
)

NEAR_END_SECONDS = 600  # ranks with long steps stop by themselves before Slurm warns


@dataclass
class Attempt:
    """One start of a job.

    Attributes:
        number: counted over the run folder's whole life, from 1.
        job: id of the Slurm job.
        restart: how often Slurm had requeued the job.
        nodes: names.
        log: file of the job's output; empty if unknown.
        started: seconds since 1970.
        progress: the newest checkpoint of each stage when it began.
        ended: seconds since 1970; None while it runs.
        outcome: one word; empty while it runs.
        reason: for the log.
        action: of `requeue_policy.Decision`.
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
    reason: str = ""
    action: str = ""


class _Record(TypedDict, total=False):
    """An attempt in attempts.json."""

    number: Required[Count]
    job: Required[JobId]
    restart: Required[Count]
    nodes: Required[list[str]]
    log: Required[str]
    started: Required[Seconds]
    progress: dict[str, str]
    ended: Seconds | None
    outcome: str
    reason: str
    action: str


def read_attempts(run: RunDir) -> list[Attempt]:
    """The attempts recorded in a run folder, oldest first.

    Raises:
        UserError: the record is damaged.
    """
    if not run.attempts.exists():
        return []
    known = _Record.__annotations__
    records = read_json(run.attempts, list[_Record])
    return [Attempt(**{k: v for k, v in record.items() if k in known}) for record in records]


def write_attempts(run: RunDir, attempts: Sequence[Attempt]) -> None:
    """Replace the list of attempts."""
    write_json(run.attempts, [asdict(attempt) for attempt in attempts])


def begin_attempt(run: RunDir, allocation: slurm.Allocation, environ: Mapping[str, str]) -> Attempt:
    """Record a new attempt.

    Raises:
        UserError: the attempts before it failed too often.
    """
    attempts = read_attempts(run)
    for lost in (attempt for attempt in attempts if attempt.ended is None):
        lost.ended, lost.outcome = time.time(), "lost"
        lost.reason = "ended with its node, or was killed"
    attempt = Attempt(
        number=len(attempts) + 1,
        job=allocation.job,
        restart=allocation.restarts,
        nodes=allocation.nodes,
        log=output_file(2),
        started=time.time(),
        progress=run.progress(),
    )
    failures = failures_in_a_row(attempts, attempt.job, attempt.progress)
    if failures >= RetryLimits.from_environ(environ).failures:
        # `end_attempt` is never reached by a job that is lost with its node each time.
        write_attempts(run, attempts)
        message = f"{failures} tries in a row without a new checkpoint"
        fix = "read the log; submit it again to resume"
        raise UserError(message, where=f"job {attempt.job}", fix=fix)
    write_attempts(run, [*attempts, attempt])
    nodes = ", ".join(attempt.nodes)
    slurm.log_line(
        f"attempt {attempt.number} of job {attempt.job} on {nodes}; at: {_listed(attempt.progress)}"
    )
    return attempt


def failures_in_a_row(attempts: Sequence[Attempt], job: str, progress: dict[str, str]) -> int:
    """Failed attempts of a job that began at this progress, counted back from the newest."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.job != job or attempt.progress != progress or attempt.ended is None:
            break
        count += attempt.outcome in FAILED_OUTCOMES
    return count


def end_attempt(run: RunDir, status: int, is_warned: bool, environ: Mapping[str, str]) -> Decision:
    """Decide what happens to the job after its attempt, and record it.

    Args:
        run: the run folder.
        status: exit status of the attempt's step.
        is_warned: whether Slurm announced the end of the job.
        environ: variables of the job.
    """
    attempts = read_attempts(run)
    attempt, report = attempts[-1], run.read_exit_report()
    result = AttemptResult(
        status=status,
        reported=report.get("status"),
        message=str(report.get("reason", "")),
        is_warned=is_warned or is_near_end(environ),
        job=slurm.job_state(attempt.job),
        has_progressed=run.progress() != attempt.progress,
        failures=failures_in_a_row(attempts[:-1], attempt.job, attempt.progress),
        tries=attempt.restart + 1,
    )
    decision = decide(result, RetryLimits.from_environ(environ))
    attempt.ended, attempt.outcome = time.time(), decision.outcome
    attempt.reason, attempt.action = decision.reason, decision.action
    write_attempts(run, attempts)
    slurm.log_line(end_line(attempt, result.message, run.progress()))
    return decision


def is_near_end(environ: Mapping[str, str]) -> bool:
    """Whether the job's time is nearly over."""
    end_time = environ.get("SLURM_JOB_END_TIME", "")
    return end_time.isdecimal() and int(end_time) - time.time() < NEAR_END_SECONDS


def end_line(attempt: Attempt, message: str, progress: dict[str, str]) -> str:
    """How an attempt ended, for the log; with the ranks' message below it if they failed."""
    took = duration((attempt.ended or attempt.started) - attempt.started)
    suffix = {"requeue": "; requeued", "stop": "; not tried again"}.get(attempt.action, "")
    line = f"attempt {attempt.number} ended after {took}: {attempt.reason}{suffix}"
    has_failed = attempt.outcome in ("failed", "crashed", "hang")
    detail = f"\n    {message}" if message and has_failed else ""
    return f"{line}; now at: {_listed(progress)}{detail}"


def _listed(progress: dict[str, str]) -> str:
    return ", ".join(f"{stage} {name}" for stage, name in progress.items()) or "nothing yet"
