"""Evaluation of held-out sets, and early stopping of a stage by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.config.train import Train
from dtrain.core.log import say
from dtrain.data.loader import Loader, MicroBatch
from dtrain.engines.base import Engine
from dtrain.evaluation.scorer import Scorer
from dtrain.objectives.base import LossOutput, Objective
from dtrain.training.progress import StageProgress, is_due
from dtrain.training.train_step import begin_step, compute_loss

MAX_BLOCKS = 256  # of sequences, whose losses are kept apart to know how certain their mean is


@dataclass(frozen=True)
class HeldOutSet:
    """Rows that are never trained on, and the objective that measures them."""

    objective: Objective
    loader: Loader


@dataclass(frozen=True)
class HeldOutResult:
    """What was measured on a held-out set, over all ranks.

    Attributes:
        loss: weighted mean.
        metrics: of the objective.
        block_losses: summed losses of blocks of sequences, at most MAX_BLOCKS: the sequence at
            position i of the set is in block i modulo their number.
        block_items: number of losses in each block.
    """

    loss: float
    metrics: dict[str, float]
    block_losses: list[float]
    block_items: list[float]


@torch.no_grad()
def evaluate(engine: Engine, held_out: HeldOutSet) -> HeldOutResult:
    """Measure a held-out set on all ranks."""
    world, objective, loader = engine.world, held_out.objective, held_out.loader
    total = weight = 0.0
    sums = dict.fromkeys(objective.metric_sum_names, 0.0)
    blocks = np.zeros((2, min(loader.total_sequences, MAX_BLOCKS)))
    engine.model.eval()
    with engine.result_weights():
        # The set counts as one batch: its statistics must not depend on ranks and micro-batches.
        statistics = begin_step(engine, objective, _batches(engine, loader))
        for batch in _batches(engine, loader):
            output = compute_loss(engine, objective, batch, statistics)
            total, weight = total + float(output.loss), weight + output.weight
            for name in sums:
                sums[name] += float(output.metric_sums[name])
            _add_to_blocks(blocks, batch, objective.item_positions(batch), output)
    total, weight, *totals = world.sum([total, weight, *sums.values(), *blocks.ravel().tolist()])
    weight, count = max(1.0, weight), len(sums)
    metrics = objective.metrics(dict(zip(sums, totals[:count], strict=True)), weight)
    losses, items = np.reshape(totals[count:], blocks.shape).tolist()
    return HeldOutResult(total / weight, metrics, losses, items)


def _batches(engine: Engine, loader: Loader) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a held-out set."""
    world, micro_batch = engine.world, engine.stage.train.micro_batch
    for step in range(loader.steps):
        yield from loader.micro_batches(step, world.rank, world.size, micro_batch)


def _add_to_blocks(
    blocks: NDArray[np.float64],
    batch: MicroBatch,
    positions: NDArray[np.int64],
    output: LossOutput,
) -> None:
    """Add a micro-batch to the sums of losses and of items [2, B]."""
    ends = np.cumsum(batch.sequence_lengths)
    sequences = np.array(batch.sequences)[ends.searchsorted(positions, side="right")]
    here = sequences % blocks.shape[1]
    np.add.at(blocks[0], here, output.item_losses.double().cpu().numpy())
    np.add.at(blocks[1], here, 1.0)


class HeldOutEvaluator:
    """Evaluates every `evaluate_every_steps` steps and ends a stage that stops improving.

    Args:
        sets: held-out sets, by name.
        train: the stage's settings.
        scorers: measure on their own steps; they decide nothing.
    """

    def __init__(
        self, sets: dict[str, HeldOutSet], train: Train, scorers: Sequence[Scorer] = ()
    ) -> None:
        self._sets, self._train, self._scorers = sets, train, scorers
        self._monitored = train.evaluate_on or next(iter(sets), None)

    def is_due(self, stage: StageProgress, total_steps: int) -> bool:
        """Whether the step just finished is to be evaluated; after the last one, the stage is."""
        is_new = stage.evaluated_step < stage.step < total_steps
        return is_new and (self._sets_are_due(stage.step) or bool(self._due_scorers(stage.step)))

    def _sets_are_due(self, step: int) -> bool:
        return is_due(step, self._train.evaluate_every_steps)

    def _due_scorers(self, step: int) -> list[Scorer]:
        return [scorer for scorer in self._scorers if is_due(step, scorer.every_steps)]

    def evaluate(self, engine: Engine, stage: StageProgress) -> dict[str, Any]:
        """Evaluate every set that is due and record the result in `stage`, early stopping included.

        Returns:
            Metrics to log.
        """
        stage.evaluated_step, stage.held_out = stage.step, {}
        metrics = self._evaluate_sets(engine, stage) if self._sets_are_due(stage.step) else {}
        scores: dict[str, dict[str, float]] = {}
        model = f"{engine.stage.name} step {stage.step}"
        for scorer in self._due_scorers(stage.step):
            for name, measured in scorer.measure(engine, model).items():
                scores[name] = {metric: score.value for metric, score in measured.items()}
                texts = [f"{metric} {score.text()}" for metric, score in measured.items()]
                say(f"step {stage.step}: {name}: {', '.join(texts)}")
        return metrics | ({"scores": scores} if scores else {})

    def _evaluate_sets(self, engine: Engine, stage: StageProgress) -> dict[str, Any]:
        measured = {name: evaluate(engine, held_out) for name, held_out in self._sets.items()}
        losses = {name: result.loss for name, result in measured.items()}
        metrics = {name: result.metrics for name, result in measured.items() if result.metrics}
        stage.held_out = {name: loss if isfinite(loss) else None for name, loss in losses.items()}
        summary = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        say(f"step {stage.step}: held-out loss: {summary}")
        if self._monitored is not None:
            self._compare_with_best(losses[self._monitored], stage)
        return {"held_out": losses} | ({"held_out_metrics": metrics} if metrics else {})

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
