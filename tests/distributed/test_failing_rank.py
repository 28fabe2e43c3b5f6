"""One rank fails while the others are in a collective that never returns: all end, and say why."""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = str(Path(__file__).with_name("failing_worker.py"))


@pytest.mark.parametrize(
    ("rank", "kind", "status", "reason"),
    [
        (1, "memory", 4, "rank 1: out of memory: CUDA out of memory"),
        (0, "memory", 4, "rank 0: out of memory: CUDA out of memory"),
        (1, "crash", 1, "rank 1: Traceback"),
    ],
)
def test_all_ranks_end_with_the_failing_ranks_status(
    run_tiny, rank: int, kind: str, status: int, reason: str
) -> None:
    run = run_tiny("device=cpu", worker=[WORKER, str(rank), kind], expect=status)
    outcome = run.json("outcome.json")
    assert (outcome["status"], outcome["rank"]) == (status, rank)
    assert outcome["reason"].startswith(reason)
    assert run.output.count(reason) == 1
    if rank:  # the first rank was ended by its own watch, not by the launcher
        assert f"rank {rank} has failed with status {status}; the others end" in run.output
