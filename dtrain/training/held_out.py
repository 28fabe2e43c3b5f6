"""Evaluation of the held-out sets during a stage, and early stopping."""

from __future__ import annotations

from math import isfinite
from typing import Any

from dtrain.config.train import Train
from dtrain.core.log import say
from dtrain.engines.base import Engine
from dtrain.training.progress import StageProgress, is_due
from dtrain.training.train_step import HeldOutSet, evaluate


class HeldOutEvaluator:
    """Evaluates every `evaluate_every_steps` steps and ends a stage that stops improving.

    Args:
        sets: held-out sets, by name.
        train: the stage's settings.
    """

    def __init__(self, sets: dict[str, HeldOutSet], train: Train) -> None:
        self._sets, self._train = sets, train
        self._monitored = train.evaluate_on or next(iter(sets), None)

    def is_due(self, stage: StageProgress, total_steps: int) -> bool:
        """Whether the step just finished is to be evaluated; after the last one, the stage is."""
        is_new = stage.evaluated_step < stage.step < total_steps
        return is_new and is_due(stage.step, self._train.evaluate_every_steps)

    def evaluate(self, engine: Engine, stage: StageProgress) -> dict[str, Any]:
        """Evaluate every set and record the result in `stage`, early stopping included.

        Returns:
            Metrics to log.
        """
        stage.evaluated_step = stage.step
        measured = {name: evaluate(engine, held_out) for name, held_out in self._sets.items()}
        losses = {name: metrics.pop("loss") for name, metrics in measured.items()}
        stage.held_out = {name: loss if isfinite(loss) else None for name, loss in losses.items()}
        summary = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        say(f"step {stage.step}: held-out loss: {summary}")
        if self._monitored is not None:
            self._compare_with_best(losses[self._monitored], stage)
        return {"held_out": losses} | (
            {"held_out_metrics": measured} if any(measured.values()) else {}
        )

    def _compare_with_best(self, loss: float, stage: StageProgress) -> None:
        is_best = isfinite(loss) and (stage.best_held_out is None or loss < stage.best_held_out)
        stage.best_held_out = loss if is_best else stage.best_held_out
        stage.evaluations_without_best = 0 if is_best else stage.evaluations_without_best + 1
        patience = self._train.early_stopping_patience
        if patience is not None and stage.evaluations_without_best >= patience:
            say(f"step {stage.step}: no better held-out loss in {patience} evaluations: early stop")
            stage.ended_early = True

    def monitored_loss(self, stage: StageProgress) -> float | None:
        """The monitored set's loss, if it was evaluated after this very step and is finite."""
        if self._monitored is None or stage.evaluated_step != stage.step:
            return None
        return stage.held_out.get(self._monitored)
