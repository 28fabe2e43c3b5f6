"""Trackio: a run for each stage, in a group for each run of dtrain."""

from __future__ import annotations

import trackio

from dtrain.training.trackers import TrackerContext

ID_CHARACTERS = 8


class TrackioRun:
    """The stage's run; trackio knows it by its name, which has an id, to be the only one."""

    def __init__(self, context: TrackerContext) -> None:
        self._run = trackio.init(
            project=context.project,
            group=context.group,
            name=f"{context.title}-{context.run_id('trackio')[:ID_CHARACTERS]}",
            resume="allow",
            config=context.settings,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def alert(self, step: int, kind: str, text: str) -> None:
        self._run.alert(title=kind, text=text, step=step)

    def close(self) -> None:
        self._run.finish()


open_run = TrackioRun
