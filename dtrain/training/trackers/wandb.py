"""Weights & Biases: a run for each stage, in a group for each run of dtrain."""

from __future__ import annotations

import wandb

from dtrain.training.trackers import TrackerContext


class WandbRun:
    """The stage's run; steps that it has already are not logged again."""

    def __init__(self, context: TrackerContext) -> None:
        self._run = wandb.init(
            project=context.project,
            group=context.group,
            name=context.title,
            id=context.run_id("wandb"),
            resume="allow",
            config=context.settings,
            dir=str(context.folder.path),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def alert(self, step: int, kind: str, text: str) -> None:
        self._run.alert(title=f"{kind} ({self._run.name})", text=text)

    def close(self) -> None:
        self._run.finish()


open_run = WandbRun
