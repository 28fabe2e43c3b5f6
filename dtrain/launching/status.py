"""The state of a run's jobs, from the run folder and the queue."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.core.errors import UserError
from dtrain.core.files import read_tail
from dtrain.core.run_dir import RunDir
from dtrain.core.units import duration, local_time
from dtrain.launching import slurm
from dtrain.launching.attempts import Attempt, read_attempts
from dtrain.launching.slurm import QueuedJob
from dtrain.launching.submit import jobs_of

UNKNOWN_TIMES = ("", "N/A", "Unknown")  # squeue's words, before the scheduler has looked at a job
LOG_BLOCK = 1 << 20  # characters read at once
_PROGRESS = re.compile(r"^\d\d:\d\d:\d\d stage (\S+): (\d+)/(\d+), (.+) left(.*)$", re.MULTILINE)


def status(run: Path) -> list[str]:
    """Describe a run: the state of its job, its progress, and each attempt.

    Raises:
        UserError: no job was ever submitted for this folder.
    """
    attempts, queued = read_attempts(RunDir(run)), queued_jobs(run)
    lines = [queue_line(job) for job in queued]
    if not queued:
        lines.append(ended_line(run, attempts))
    if attempts:
        lines.append(f"requeued {times(attempts[-1].restart)}")
        if any(job.state == "RUNNING" for job in queued):
            lines += progress_lines(run)
    lines += [attempt_line(attempt) for attempt in attempts]
    return lines


def has_jobs(run: Path) -> bool:
    """Whether a job was ever submitted or started for a run folder."""
    return bool(jobs_of(run) or read_attempts(RunDir(run)))


def known_jobs(run: Path) -> list[str]:
    """Ids of every job of a run folder, oldest first.

    Raises:
        UserError: there is none.
    """
    job_ids = [str(job["job"]) for job in jobs_of(run)] + [
        a.job for a in read_attempts(RunDir(run))
    ]
    if not job_ids:
        fix = "give the folder that output.folder named"
        raise UserError("no job was ever started in this folder", where=str(run), fix=fix)
    return list(dict.fromkeys(job_ids))


def queued_jobs(run: Path) -> list[QueuedJob]:
    """Jobs of a run that are waiting or running."""
    return slurm.queue(known_jobs(run))


def queue_line(job: QueuedJob) -> str:
    """Describe a job of the queue, with the reason if it waits."""
    if job.state == "PENDING":
        starts = "" if job.starts in UNKNOWN_TIMES else f"; expected to start at {job.starts}"
        return f"job {job.job} ({job.name}) is waiting: {job.reason}{starts}"
    return f"job {job.job} ({job.name}) is {job.state.lower()} on {job.where} for {job.elapsed}"


def ended_line(run: Path, attempts: list[Attempt]) -> str:
    """Describe how the last job ended."""
    if not attempts:
        return "the job left the queue before it started: see dtrain logs"
    last = attempts[-1]
    line = f"job {last.job} ended: {last.reason or 'by Slurm, or with its node'}"
    if last.outcome != "finished":
        reason = str(RunDir(run).read_exit_report().get("reason", ""))
        line += f"\n    {reason}" if reason else ""
    return line


def progress_lines(run: Path) -> Iterator[str]:
    """Step, time left and speed, from the log."""
    log = log_of(run)
    if log is None:
        return
    if lines := _PROGRESS.findall(read_tail(log)):
        stage, step, steps, left, note = lines[-1]
        yield f"stage {stage}: step {step} of {steps}, {left} left{note}"


def attempt_line(attempt: Attempt) -> str:
    """Describe an attempt."""
    began = local_time(attempt.started)
    head = f"attempt {attempt.number}  {began}  job {attempt.job}  {','.join(attempt.nodes)}"
    if attempt.ended is None:
        return f"{head}  not ended"
    took = duration(attempt.ended - attempt.started)
    return f"{head}  {took}: {attempt.reason}" + (", requeued" * (attempt.action == "requeue"))


def times(count: int) -> str:
    """A count of times, in words."""
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def log_of(run: Path) -> Path | None:
    """The newest log of a run in its folder; None if there is none yet.

    The list of attempts may be a stranger's: it cannot name a file outside of the folder.
    """
    named = [Path(log) for log in reversed(named_logs(run))]
    written = [RunDir(run).job_log(kind) for kind in ("job", "prepare")]
    return next((log for log in [*named, *written] if _is_inside(log, run)), None)


def named_logs(run: Path) -> list[str]:
    """The files that each attempt printed to, oldest first."""
    return [attempt.log for attempt in read_attempts(RunDir(run)) if attempt.log]


def _is_inside(log: Path, run: Path) -> bool:
    try:
        path = log.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there, or no name of a file
        return False
    return path.is_file() and path.is_relative_to(run.resolve())


def follow(run: Path, *, until_over: bool) -> Iterator[str]:
    """Yield the log, and with `until_over` what is added until no job of the run is in the queue.

    Raises:
        UserError: there is no log.
    """
    known_jobs(run)
    log = log_of(run)
    if log is None and not until_over:
        outside = named_logs(run)[-1:]  # sbatch wrote it where the job was submitted
        fix = f"read it with: less {shlex.quote(outside[0])}" if outside else "see: dtrain status"
        message = "the job's log is not in this folder" if outside else "there is no log yet"
        raise UserError(message, where=str(run), fix=fix)
    position = 0
    while True:
        is_over = not until_over or not queued_jobs(run)
        log = log or log_of(run)
        if log is not None:
            with open(log, encoding="utf-8", errors="replace") as file:
                file.seek(position)
                while text := file.read(LOG_BLOCK):
                    yield text
                position = file.tell()
        if is_over:
            return
        time.sleep(2)
