"""How long a rank is in collectives.

The functions of torch.distributed that engines call in a step are wrapped once per process. A
wrapper adds to the active timer, and does nothing while there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What engines call in a step, under the names of torch 2.11 to 2.13.
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "broadcast",
    "reduce",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)

_active: CollectiveTimer | None = None


class CollectiveTimer:
    """Adds up the time in collectives, waiting for slower ranks included.

    On a CPU this is the time until a collective returns, or in the wait for an asynchronous one. On
    a GPU two events measure when the stream reaches and passes it, which costs no synchronization;
    collectives on a stream of their own then count where they overlap computation, too.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Make this the process's active timer."""
        global _active
        _active = self
        for name in COLLECTIVES:
            function = getattr(dist, name, None)
            if function is not None and not hasattr(function, "is_timed"):
                setattr(dist, name, _timed(function))

    def stop(self) -> None:
        """Leave the process without an active timer."""
        global _active
        _active = None

    def take(self) -> float:
        """Seconds since the last call; on a GPU of the events that it has passed."""
        seconds, self._seconds = self._seconds, 0.0
        pending = []
        for begin, end in self._events:
            if end.query():
                seconds += begin.elapsed_time(end) / 1000
            else:
                pending.append((begin, end))
        self._events = pending
        return seconds

    def now(self, *, on_gpu: bool) -> float | torch.cuda.Event:
        """A moment, for `add`; on a GPU when the current stream reaches it."""
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: float | torch.cuda.Event) -> None:
        """Add the time from `begin` until now."""
        if isinstance(begin, float):
            self._seconds += time.perf_counter() - begin
            return
        end = self.now(on_gpu=True)
        assert not isinstance(end, float)
        self._events.append((begin, end))


class TimedWork:
    """The handle of an asynchronous collective; only the wait for it counts."""

    def __init__(self, work: Any, *, on_gpu: bool) -> None:
        self._work, self._on_gpu = work, on_gpu

    def wait(self, *args: Any, **settings: Any) -> Any:
        """Wait as the handle itself does."""
        if _active is None:
            return self._work.wait(*args, **settings)
        begin = _active.now(on_gpu=self._on_gpu)
        result = self._work.wait(*args, **settings)
        _active.add(begin)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        timer = _active
        if timer is None:
            return function(*args, **settings)
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in (*args, *settings.values()))
        if settings.get("async_op"):
            work = function(*args, **settings)
            return work and TimedWork(work, on_gpu=on_gpu)
        begin = timer.now(on_gpu=on_gpu)
        result = function(*args, **settings)
        timer.add(begin)
        return result

    call.is_timed = True  # type: ignore[attr-defined]
    return call
