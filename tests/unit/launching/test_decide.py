"""Only what another try can help is tried again, and not for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.core.errors import Exit
from dtrain.launching.requeue_policy import Bounds, Ended, decide
from dtrain.launching.slurm import JobState, parse_state

RUNNING = JobState("RUNNING")
CRASH = Ended(
    status=1,
    outcome=1,
    reason="",
    warned=False,
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
        ({"status": 0, "outcome": 0}, "over", "finished"),
        # Another try cannot help, whatever else is true.
        *(({"outcome": int(s)}, "stop", "failed") for s in (2, 3, 4)),
        *(({"status": int(s), "outcome": None}, "stop", "failed") for s in (2, 3, 4)),
        ({"outcome": Exit.OUT_OF_MEMORY, "warned": True}, "stop", "failed"),
        # Announced by Slurm.
        ({"status": 75, "outcome": 75, "warned": True}, "requeue", "warned"),
        ({"status": 138, "outcome": None, "warned": True}, "requeue", "warned"),
        ({"outcome": 75, "job": JobState("RUNNING", True)}, "requeue", "preempted"),
        # Asked by hand, cancelled, or taken by Slurm: never raised again.
        ({"status": 75, "outcome": 75}, "stop", "stopped"),
        *(
            ({"status": 75, "outcome": 75, "warned": True, "job": JobState(s)}, "leave", s.lower())
            for s in ("CANCELLED", "COMPLETING", "TIMEOUT", "NODE_FAIL", "PENDING", "UNKNOWN")
        ),
        # Lost.
        ({"status": 137, "outcome": None}, "requeue", "lost a worker"),
        ({"status": 75, "outcome": None}, "requeue", "lost a worker"),
        ({"status": 75, "outcome": 1}, "requeue", "crashed"),
        ({"outcome": 5}, "requeue", "hang"),
        ({"outcome": 1, "warned": True}, "requeue", "crashed"),
        # Bounds.
        ({"failures": 2}, "stop", "failed"),
        ({"failures": 2, "has_progressed": True}, "requeue", "crashed"),
        ({"failures": 9, "outcome": 75, "job": JobState("RUNNING", True)}, "requeue", "preempted"),
        ({"failures": 2, "outcome": 75, "warned": True}, "stop", "failed"),  # limit too short
        (
            {"failures": 2, "outcome": 75, "warned": True, "has_progressed": True},
            "requeue",
            "warned",
        ),
        ({"tries": 100, "outcome": 75, "warned": True}, "stop", "failed"),
    ],
)
def test_verdict(change, action, outcome):
    verdict = decide(replace(CRASH, **change), Bounds())
    assert (verdict.action, verdict.outcome) == (action, outcome)
    assert (verdict.status == 0) == (action == "over")


def test_state_is_not_read_out_of_names():
    assert parse_state(SHOWN) == JobState("RUNNING", True)
    assert parse_state(SHOWN.replace("PreemptTime=2026-11-22T00:00:09", "PreemptTime=None")) == (
        JobState("RUNNING")
    )
    assert parse_state("") == JobState("UNKNOWN")
