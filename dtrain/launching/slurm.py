"""Slurm's commands and answers.

The text formats are parsed: `scontrol --json` needs Slurm 23, and `squeue --json` of Slurm 22 lists
every job of the cluster, whatever --me and --jobs say.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.core.errors import UserError

ANSWER_SECONDS = 60
_QUEUE_FIELDS = ("%i", "%T", "%r", "%M", "%l", "%D", "%R", "%k", "%j", "%S")


@dataclass(frozen=True)
class JobState:
    """The controller's answer about a job.

    Attributes:
        state: RUNNING, PENDING, CANCELLED, …; UNKNOWN if it could not be asked.
        is_preempted: whether it is being preempted at this moment.
    """

    state: str
    is_preempted: bool = False


@dataclass(frozen=True)
class QueuedJob:
    """A line of the queue.

    Attributes:
        starts: when it started; of a waiting job, when the scheduler expects it to.
    """

    job: str
    state: str
    reason: str
    elapsed: str
    limit: str
    nodes: str
    where: str
    comment: str
    name: str
    starts: str


@dataclass(frozen=True)
class Allocation:
    """The nodes of the Slurm job that this process runs in.

    Attributes:
        job: id of the job.
        nodes: names, the one of this process first.
        gpus: on each node; 0 if Slurm gave none.
        cores: of a node, as Slurm says it; None if it does not.
        restarts: how often Slurm has requeued the job.
    """

    job: str
    nodes: list[str]
    gpus: int
    cores: str | None
    restarts: int


def current_allocation(environ: Mapping[str, str]) -> Allocation:
    """The allocation that this process runs in.

    Raises:
        UserError: this is not a Slurm job.
    """
    node_list = environ.get("SLURM_JOB_NODELIST")
    if not node_list:
        fix = "start it with sbatch, or use: dtrain run"
        raise UserError("this is not a job of Slurm", where="SLURM_JOB_NODELIST", fix=fix)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    return Allocation(
        job=environ["SLURM_JOB_ID"],
        nodes=ask(["scontrol", "show", "hostnames", node_list]).split(),
        gpus=int(gpus) if gpus.isdecimal() else 0,
        cores=environ.get("SLURM_CPUS_PER_TASK"),
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
    )


def ask(command: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a Slurm command; return its output.

    Raises:
        UserError: there is no Slurm here, or the command fails, with its message.
    """
    if shutil.which(command[0]) is None:
        fix = "run this on a login node of the cluster"
        raise UserError(f"there is no {command[0]} on this machine", where="Slurm", fix=fix)
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=ANSWER_SECONDS,
            check=False,
            errors="surrogateescape",
        )
    except subprocess.TimeoutExpired as error:
        message = f"{command[0]} has not answered in {ANSWER_SECONDS} s"
        raise UserError(message, where="Slurm", fix="try again later") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace(f"{command[0]}: ", "")
        raise UserError(f"{command[0]}: {said or done.returncode}", where="Slurm")
    return done.stdout if command[0] != "sbatch" else done.stdout or done.stderr


def job_state(job: str) -> JobState:
    """A job's state; UNKNOWN when the controller does not answer."""
    try:
        return parse_state(ask(["scontrol", "show", "job", job]))
    except UserError:
        return JobState("UNKNOWN")


def parse_state(text: str) -> JobState:
    """Parse `scontrol show job`; a job's name may contain anything, so lines' starts count."""
    state = re.search(r"^ +JobState=(\S+)", text, re.MULTILINE)
    preempted = re.search(r"^ +PreemptEligibleTime=\S+ PreemptTime=(\S+)", text, re.MULTILINE)
    is_preempted = preempted is not None and preempted[1] not in ("None", "N/A", "Unknown")
    return JobState(state[1] if state else "UNKNOWN", is_preempted)


def queue(jobs: Sequence[str] | None = None, *, as_array: bool = False) -> list[QueuedJob]:
    """The jobs in the queue: the caller's, or those of `jobs`.

    Args:
        as_array: list each waiting job of an array by itself.
    """
    separator, last = "\x1f", "\x1e"  # a comment names a folder, which may hold a line break
    choice = [f"--jobs={','.join(jobs)}"] if jobs is not None else ["--me"]
    choice += ["--array"] if as_array else []
    form = separator.join(_QUEUE_FIELDS) + last
    try:
        text = ask(["squeue", "--noheader", f"--format={form}", *choice])
    except UserError as error:
        if "Invalid job id" in error.message:  # long gone
            return []
        raise
    records = (record.split(separator) for record in text.split(f"{last}\n"))
    return [QueuedJob(*fields) for fields in records if len(fields) == len(_QUEUE_FIELDS)]


def requeue(job: str) -> None:
    """Put a running job back into the queue; Slurm ends its processes."""
    ask(["scontrol", "requeue", job])


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; jobs that have ended are ignored."""
    ask(["scancel", "--quiet", *jobs])


def log_line(message: str) -> None:
    """Print a line to the job's log."""
    print(stamped(message), file=sys.stderr, flush=True)


def stamped(message: str) -> str:
    """A line of the job's log, with the time of day."""
    return f"dtrain {time.strftime('%H:%M:%S')}: {message}"
