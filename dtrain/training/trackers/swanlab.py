"""SwanLab: a run for each stage."""

from __future__ import annotations

import swanlab

from dtrain.training.trackers import TrackerContext


class SwanLabRun:
    """The stage's run."""

    def __init__(self, context: TrackerContext) -> None:
        self._run = swanlab.init(
            project=context.project,
            group=context.group,
            name=context.title,
            id=context.run_id("swanlab"),
            resume="allow",
            config=context.settings,
            log_dir=str(context.folder.path / "swanlab"),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def alert(self, step: int, kind: str, text: str) -> None:
        self._run.log({f"alert/{kind}": swanlab.Text(text)}, step=step)

    def close(self) -> None:
        self._run.finish()


open_run = SwanLabRun
