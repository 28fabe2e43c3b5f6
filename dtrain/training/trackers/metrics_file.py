"""metrics.jsonl in the stage's folder, which the report and the next attempt read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dtrain.monitoring.metrics import Metrics
from dtrain.training.callbacks import Callback


class MetricsFile(Callback):
    """Writes one line a step."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    @classmethod
    def resumed(cls, path: Path, resume_step: int) -> MetricsFile:
        """Continue the stage's file; lines of steps that will be repeated are dropped."""
        return cls(Metrics(path, resume_at=resume_step))

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self._metrics.write({"step": step, **metrics})

    def close(self) -> None:
        self._metrics.close()
