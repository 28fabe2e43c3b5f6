"""A job is requeued only if another attempt can help, and not forever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.core.errors import Exit
from dtrain.launching.requeue_policy import AttemptResult, RetryLimits, decide
from dtrain.launching.slurm import JobState, parse_state

RUNNING = JobState("RUNNING")
CRASH = AttemptResult(
    status=1,
    reported=1,
    message="",
    is_warned=False,
    job=RUNNING,
    has_progressed=False,
    failures=0,
    tries=1,
)
SHOWN = """JobId=7 JobName=JobState=CANCELLED
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   PreemptEligibleTime=2026-11-22T00:00:01 PreemptTime=2026-11-22T00:00:09
   Comment=dtrain: JobState=FAILED PreemptTime=None
"""


@pytest.mark.parametrize(
    ("change", "action", "outcome"),
    [
        ({"status": 0, "reported": 0}, "over", "finished"),
        # Another try cannot help, whatever else is true.
        *(({"reported": int(s)}, "stop", "failed") for s in (2, 3, 4)),
        *(({"status": int(s), "reported": None}, "stop", "failed") for s in (2, 3, 4)),
        ({"reported": Exit.OUT_OF_MEMORY, "is_warned": True}, "stop", "failed"),
        ({"reported": Exit.GATE_FAILED}, "stop", "failed"),
        # Announced by Slurm.
        ({"status": 75, "reported": 75, "is_warned": True}, "requeue", "warned"),
        ({"status": 138, "reported": None, "is_warned": True}, "requeue", "warned"),
        ({"reported": 75, "job": JobState("RUNNING", True)}, "requeue", "preempted"),
        # Asked by hand, cancelled, or ended by Slurm: never revived.
        ({"status": 75, "reported": 75}, "stop", "stopped"),
        *(
            (
                {"status": 75, "reported": 75, "is_warned": True, "job": JobState(s)},
                "leave",
                s.lower(),
            )
            for s in ("CANCELLED", "COMPLETING", "TIMEOUT", "NODE_FAIL", "PENDING", "UNKNOWN")
        ),
        # Lost.
        ({"status": 137, "reported": None}, "requeue", "lost a worker"),
        ({"status": 75, "reported": None}, "requeue", "lost a worker"),
        ({"status": 75, "reported": 1}, "requeue", "crashed"),
        ({"reported": 5}, "requeue", "hang"),
        ({"reported": 1, "is_warned": True}, "requeue", "crashed"),
        # Limits.
        ({"failures": 2}, "stop", "failed"),
        ({"failures": 2, "has_progressed": True}, "requeue", "crashed"),
        ({"failures": 9, "reported": 75, "job": JobState("RUNNING", True)}, "requeue", "preempted"),
        ({"failures": 2, "reported": 75, "is_warned": True}, "stop", "failed"),  # limit too short
        (
            {"failures": 2, "reported": 75, "is_warned": True, "has_progressed": True},
            "requeue",
            "warned",
        ),
        ({"tries": 100, "reported": 75, "is_warned": True}, "stop", "failed"),
    ],
)
def test_a_job_is_requeued_only_if_another_attempt_can_help(change, action, outcome):
    decision = decide(replace(CRASH, **change), RetryLimits())
    assert (decision.action, decision.outcome) == (action, outcome)
    assert (decision.status == 0) == (action == "over")


def test_job_name_is_not_parsed_as_the_state():
    assert parse_state(SHOWN) == JobState("RUNNING", True)
    assert parse_state(SHOWN.replace("PreemptTime=2026-11-22T00:00:09", "PreemptTime=None")) == (
        JobState("RUNNING")
    )
    assert parse_state("") == JobState("UNKNOWN")
