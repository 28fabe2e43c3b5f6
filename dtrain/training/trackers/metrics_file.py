"""metrics.jsonl in the stage's folder, which the report and the next attempt read."""

from __future__ import annotations

from typing import Any

from dtrain.monitoring.metrics import Metrics
from dtrain.training.callbacks import Callback
from dtrain.training.trackers import TrackerContext


class MetricsFile(Callback):
    """Writes one line a step."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self._metrics.write({"step": step, **metrics})

    def close(self) -> None:
        self._metrics.close()


def build_tracker(context: TrackerContext) -> MetricsFile:
    """Continue the stage's file; lines of steps that will be repeated are dropped."""
    return MetricsFile(Metrics(context.folder.metrics, resume_at=context.resume_step))
