"""TensorBoard: event files in the folder `tensorboard` of the stage."""

from __future__ import annotations

import json

from torch.utils.tensorboard import SummaryWriter

from dtrain.training.trackers import TrackerContext


class TensorBoardRun:
    """The stage's event files; those of lost steps are hidden."""

    def __init__(self, context: TrackerContext) -> None:
        folder = str(context.folder.path / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=context.resume_step + 1)
        if context.resume_step == 0:
            self._writer.add_text(
                "recipe", f"```json\n{json.dumps(context.settings, indent=2)}\n```"
            )
            self._writer.flush()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # else a killed attempt loses what its queue still held

    def alert(self, step: int, kind: str, text: str) -> None:
        self._writer.add_text(f"alert/{kind}", text, step)

    def close(self) -> None:
        self._writer.close()


open_run = TensorBoardRun
