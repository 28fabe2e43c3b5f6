"""Trackers send a stage's metrics somewhere: to a file, to a service.

To add one, add a module here with a function `build_tracker(context)` that returns a `Callback`,
or None if it should not run, for example because its service's variable is not set. No other file
changes. A tracker overrides `Callback.log_metrics`, which also gets evaluations: those have no
`loss`. It drops what an earlier attempt recorded after `context.resume_step`, as
`dtrain.monitoring.metrics.Metrics` does. It writes to `context.folder.path`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules

from dtrain.config.schema import Recipe, Stage
from dtrain.core.run_dir import StageDir
from dtrain.training.callbacks import Callback


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


def build_trackers(context: TrackerContext) -> list[Callback]:
    """All trackers that run; called on the first rank only."""
    names = sorted(module.name for module in iter_modules(__path__))
    built = [import_module(f"{__name__}.{name}").build_tracker(context) for name in names]
    return [tracker for tracker in built if tracker is not None]
