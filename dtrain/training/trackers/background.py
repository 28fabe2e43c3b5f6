"""Send metrics to a service from a thread: a client that fails or hangs costs no step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from typing import Any, Protocol

from dtrain.core.errors import first_line
from dtrain.core.log import warn
from dtrain.monitoring.alerts import Alert
from dtrain.monitoring.metrics import is_number
from dtrain.training.callbacks import Tracker

QUEUE_RECORDS = 1000
CLOSE_SECONDS = 30.0


class TrackerRun(Protocol):
    """The run of a stage in a service."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step, whose names have parts joined by "/"."""

    def alert(self, step: int, kind: str, text: str) -> None:
        """Record that something is wrong, so that a person sees it; a kind comes once."""

    def close(self) -> None:
        """Send what is left."""


class BackgroundTracker(Tracker):
    """Opens a run in a service, sends it metrics, and closes it, all in a daemon thread.

    Args:
        name: of the service, for messages.
        open_run: starts or continues the run.
    """

    def __init__(self, name: str, open_run: Callable[[], TrackerRun]) -> None:
        self._name, self._open_run = name, open_run
        self._queue: Queue[Callable[[TrackerRun], None] | None] = Queue(QUEUE_RECORDS)
        self._is_closing = self._is_over = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        numbers = flat_numbers(metrics)
        self._send(lambda run: run.log(step, numbers))

    def log_alert(self, alert: Alert) -> None:
        text = f"step {alert.step}: {alert.evidence}; {alert.advice}"
        self._send(lambda run: run.alert(alert.step, alert.kind, text))

    def _send(self, record: Callable[[TrackerRun], None]) -> None:
        if self._is_over:
            return
        try:
            self._queue.put_nowait(record)
        except Full:
            self._give_up("does not answer")

    def close(self) -> None:
        self._is_closing = True
        with suppress(Full):  # then the thread does not wait, and sees the flag
            self._queue.put_nowait(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up("does not answer")

    def _work(self) -> None:
        try:
            run = self._open_run()
            while not (self._is_closing and self._queue.empty()):
                if (record := self._queue.get()) is not None:
                    record(run)
            run.close()
        except (Exception, SystemExit) as error:  # of a client, which may be anything
            self._give_up(first_line(error))

    def _give_up(self, reason: str) -> None:
        with self._lock:  # a client that did not answer in time can fail later, in the thread
            if self._is_over:
                return
            self._is_over = True
        warn(f"{self._name}: {reason}; it gets no more metrics of this stage (metrics.jsonl does)")


def flat_numbers(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of nested metrics, by names such as "seconds/compute"."""
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            numbers |= flat_numbers(value, f"{prefix}{name}/")
        elif is_number(value):
            numbers[f"{prefix}{name}"] = value
    return numbers
