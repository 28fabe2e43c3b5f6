"""Trackers send a stage's metrics somewhere: to a file, to a service.

A service has a module here, named in the table of `dtrain/config/trackers.py`, with a function
`open_run(context)`, which starts or continues the stage's run there and returns a `TrackerRun`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from dtrain.config.schema import Recipe, Stage
from dtrain.core.files import read_json, write_json
from dtrain.core.stage_dir import StageDir
from dtrain.monitoring.metrics import Metrics
from dtrain.training.callbacks import Tracker
from dtrain.training.trackers.background import BackgroundTracker, TrackerRun


@dataclass(frozen=True)
class TrackerContext:
    """The stage that a tracker follows.

    Attributes:
        folder: names of the files in the stage's folder.
        resume_step: steps finished before this attempt; later metrics belong to lost steps.
    """

    recipe: Recipe
    stage: Stage
    folder: StageDir
    resume_step: int

    @property
    def project(self) -> str:
        """The project's name in a service."""
        return self.recipe.monitoring.project or self.recipe.name

    @property
    def group(self) -> str:
        """The name that the runs of all stages share in a service."""
        return Path(self.recipe.output.folder).name

    @property
    def title(self) -> str:
        """The name of the stage's run in a service."""
        return f"{self.group}/{self.stage.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved recipe, which never contains a secret."""
        return self.recipe.model_dump(mode="json", exclude_none=True)

    def run_id(self, kind: str, create: Callable[[], str] = lambda: uuid4().hex) -> str:
        """The id of the stage's run in a service, the same for every attempt."""
        path = self.folder.tracker_runs
        known: dict[str, str] = read_json(path, dict[str, str]) if path.exists() else {}
        if kind not in known:
            known[kind] = create()
            write_json(path, known)
        return known[kind]


class MetricsFile(Tracker):
    """metrics.jsonl in the stage's folder, which the report and the next attempt read."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self._metrics = Metrics(path, resume_at=resume_step)

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        self._metrics.write({"step": step, **metrics})

    def close(self) -> None:
        self._metrics.close()


def build_trackers(context: TrackerContext) -> list[Tracker]:
    """All trackers that run; called on the first rank only."""
    trackers: list[Tracker] = [MetricsFile(context.folder.metrics, context.resume_step)]
    for kind in dict.fromkeys(context.recipe.monitoring.report_to):
        trackers.append(BackgroundTracker(kind, partial(_open_run, kind, context)))
    return trackers


def _open_run(kind: str, context: TrackerContext) -> TrackerRun:
    run: TrackerRun = import_module(f"{__name__}.{kind}").open_run(context)
    return run
