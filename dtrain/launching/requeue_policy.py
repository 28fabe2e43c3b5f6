"""Whether a job that ended is tried again: only what another try can help, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dtrain.core.errors import Exit
from dtrain.launching.slurm import JobState

HOPELESS = {
    Exit.USER_ERROR: "a mistake in recipe, data or model",
    Exit.NON_FINITE: "loss or gradients stayed non-finite",
    Exit.OUT_OF_MEMORY: "out of memory",
}


@dataclass(frozen=True)
class Ended:
    """All that is known when an attempt has ended.

    Attributes:
        status: exit status of the attempt's step.
        outcome: exit status that the workers left in outcome.json; None if they left none.
        reason: what the workers said there.
        warned: whether Slurm announced the end (time limit or preemption).
        job: what the controller says now.
        has_progressed: whether there is a new checkpoint since the attempt began.
        failures: failed attempts in a row without a new checkpoint, before this one.
        tries: attempts of this job, this one included.
    """

    status: int
    outcome: int | None
    reason: str
    warned: bool
    job: JobState
    has_progressed: bool
    failures: int
    tries: int


@dataclass(frozen=True)
class Bounds:
    """How often a job is tried."""

    tries: int = 100
    failures: int = 3


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job.

    Attributes:
        action: over (finished), requeue, stop (another try cannot help), leave (Slurm decides).
        outcome: one word for the list of attempts.
        because: the reason, for the log.
        status: exit status of the job, where it ends here.
    """

    action: Literal["over", "requeue", "stop", "leave"]
    outcome: str
    because: str
    status: int


def decide(ended: Ended, bounds: Bounds) -> Verdict:
    """What becomes of the job after an attempt."""
    if ended.outcome == Exit.FINISHED or (ended.outcome is None and ended.status == 0):
        return Verdict("over", "finished", "finished", Exit.FINISHED)
    for status, name in HOPELESS.items():
        if status in (ended.outcome, ended.status):
            why = f"{name}; another try cannot help"
            return Verdict("stop", "failed", why, int(status))
    ends_with = ended.status or int(Exit.CRASHED)
    if ended.job.state != "RUNNING":
        # Cancelled, out of time, a node gone: requeueing now would raise a cancelled job again.
        why = f"the job is {ended.job.state}; Slurm decides"
        return Verdict("leave", ended.job.state.lower(), why, ends_with)
    outcome, counts = _what_happened(ended)
    if outcome == "stopped":
        why = "asked to stop; submit it again to go on"
        return Verdict("stop", outcome, why, ends_with)
    if counts and not ended.has_progressed and ended.failures + 1 >= bounds.failures:
        why = f"{outcome}; {ended.failures + 1} tries in a row without a new checkpoint"
        return Verdict("stop", "failed", why, ends_with)
    if ended.tries >= bounds.tries:
        return Verdict(
            "stop", "failed", f"{outcome}; that was try {ended.tries}, the last", ends_with
        )
    return Verdict("requeue", outcome, outcome, ends_with)


def _what_happened(ended: Ended) -> tuple[str, bool]:
    """One word, and whether it counts as a failure where it brought no new checkpoint."""
    if ended.job.is_preempted:
        return "preempted", False
    if ended.warned and (ended.outcome is None or ended.outcome == Exit.INTERRUPTED):
        return "warned", True  # a time limit too short to come to a checkpoint stays too short
    if Exit.HANG in (ended.outcome, ended.status):
        return "hang", True
    # The step's own status says "go on" too where srun ended the ranks that a lost one had left.
    if ended.outcome == Exit.INTERRUPTED:
        return "stopped", False
    return ("lost a worker" if ended.outcome is None else "crashed"), True
