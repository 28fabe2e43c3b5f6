"""Whether a job is requeued after an attempt: only if another attempt can help, and not forever."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dtrain.core.errors import Exit
from dtrain.launching.slurm import JobState

PERMANENT_FAILURES = {
    Exit.USER_ERROR: "a mistake in recipe, data or model",
    Exit.NON_FINITE: "loss or gradients stayed non-finite",
    Exit.OUT_OF_MEMORY: "out of memory",
    Exit.GATE_FAILED: "an evaluation gate failed",
    Exit.DIVERGED: "the training diverged",
}
# Outcomes that count as failures where an attempt saved no new checkpoint. A time limit too short
# for a checkpoint stays too short; a preemption is not a failure and does not count.
FAILED_OUTCOMES = ("hang", "crashed", "lost", "lost a worker", "warned")


@dataclass(frozen=True)
class AttemptResult:
    """All that is known when an attempt has ended.

    Attributes:
        status: exit status of the attempt's step.
        reported: exit status in the ranks' exit report; None if they left none.
        message: reason in the exit report.
        is_warned: whether Slurm announced the end (time limit or preemption).
        job: what the controller says now.
        has_progressed: whether there is a new checkpoint since the attempt began.
        failures: failed attempts in a row without a new checkpoint, before this one.
        tries: attempts of this job, this one included.
    """

    status: int
    reported: int | None
    message: str
    is_warned: bool
    job: JobState
    has_progressed: bool
    failures: int
    tries: int


@dataclass(frozen=True)
class RetryLimits:
    """How often a job is tried.

    Attributes:
        tries: starts of a job, whatever ended them.
        failures: failed attempts in a row without a new checkpoint.
    """

    tries: int = 100
    failures: int = 3

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> RetryLimits:
        """The limits in DTRAIN_MAX_TRIES and DTRAIN_MAX_FAILURES."""
        return cls(
            tries=int(environ.get("DTRAIN_MAX_TRIES") or cls.tries),
            failures=int(environ.get("DTRAIN_MAX_FAILURES") or cls.failures),
        )


@dataclass(frozen=True)
class Decision:
    """What happens to the job after an attempt.

    Attributes:
        action: over (finished), requeue, stop (another attempt cannot help), leave (Slurm decides).
        outcome: one word for the list of attempts.
        reason: for the log.
        status: exit status of the job, if it ends here.
    """

    action: Literal["over", "requeue", "stop", "leave"]
    outcome: str
    reason: str
    status: int


def decide(result: AttemptResult, limits: RetryLimits) -> Decision:
    """Decide what happens to the job after an attempt."""
    if result.reported == Exit.FINISHED or (result.reported is None and result.status == 0):
        return Decision("over", "finished", "finished", Exit.FINISHED)
    for permanent, name in PERMANENT_FAILURES.items():
        if permanent in (result.reported, result.status):
            return Decision("stop", "failed", f"{name}; another try cannot help", int(permanent))
    status = result.status or int(Exit.CRASHED)
    if result.job.state != "RUNNING":
        # Cancelled, out of time, a node lost: requeueing now would revive a cancelled job.
        state = result.job.state
        return Decision("leave", state.lower(), f"the job is {state}; Slurm decides", status)
    outcome = classify(result)
    if outcome == "stopped":
        return Decision("stop", outcome, "asked to stop; submit it again to resume", status)
    if (
        outcome in FAILED_OUTCOMES
        and not result.has_progressed
        and result.failures + 1 >= limits.failures
    ):
        reason = f"{outcome}; {result.failures + 1} tries in a row without a new checkpoint"
        return Decision("stop", "failed", reason, status)
    if result.tries >= limits.tries:
        return Decision(
            "stop", "failed", f"{outcome}; that was try {result.tries}, the last", status
        )
    return Decision("requeue", outcome, outcome, status)


def classify(result: AttemptResult) -> str:
    """One word for an attempt of a running job that did not finish."""
    if result.job.is_preempted:
        return "preempted"
    if result.is_warned and result.reported in (None, Exit.INTERRUPTED):
        return "warned"
    if Exit.HANG in (result.reported, result.status):
        return "hang"
    # The step's own status says INTERRUPTED too where srun ended the ranks after one was lost.
    if result.reported == Exit.INTERRUPTED:
        return "stopped"
    return "lost a worker" if result.reported is None else "crashed"
