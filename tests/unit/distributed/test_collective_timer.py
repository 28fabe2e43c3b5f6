"""Time in collectives: what counts, and that nothing is wrapped twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from dtrain.distributed import collective_timer
from dtrain.distributed.collective_timer import CollectiveTimer


class Clock:
    """Seconds that only collectives spend."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Work:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def wait(self) -> bool:
        self._clock.seconds += 4.0
        return True

    def is_completed(self) -> bool:
        return False


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def all_reduce(tensor: torch.Tensor, async_op: bool = False) -> Any:
        clock.seconds += 1.0
        return Work(clock) if async_op else None

    for name in collective_timer.COLLECTIVES:
        monkeypatch.setattr(dist, name, all_reduce, raising=False)
    monkeypatch.setattr(collective_timer, "time", clock)
    return clock


def test_a_call_counts_and_an_asynchronous_one_only_in_its_wait(clock: Clock) -> None:
    timer, tensor = CollectiveTimer(), torch.zeros(1)
    timer.start()
    timer.start()  # the next engine's start wraps nothing again
    dist.all_reduce(tensor)
    dist.reduce(tensor=tensor)
    assert timer.take() == 2.0
    work: Any = dist.all_reduce(tensor, async_op=True)
    assert timer.take() == 0.0
    assert not work.is_completed() and work.wait()
    assert timer.take() == 4.0
    timer.stop()
    dist.all_reduce(tensor)
    assert timer.take() == 0.0
