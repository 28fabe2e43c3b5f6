"""Evaluation of held-out sets, and early stopping of a stage by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.checkpoints.folder import LOSS, SCORE, WATCHED
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.train import Train
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.data.loader import Loader, MicroBatch
from dtrain.engines.base import Engine
from dtrain.evaluation.scorer import Scorer
from dtrain.objectives.base import Objective
from dtrain.training.progress import StageProgress, is_due
from dtrain.training.train_step import begin_step, compute_loss

MAX_EXPONENT = 700.0
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
        sources: `loss` and `items` of each of several sources, `perplexity` if the loss is the
            cross-entropy of tokens; empty with one source.
    """

    loss: float
    metrics: dict[str, float]
    block_losses: list[float]
    block_items: list[float]
    sources: dict[str, dict[str, float]] = field(default_factory=dict)


@torch.no_grad()
def evaluate(engine: Engine, held_out: HeldOutSet) -> HeldOutResult:
    """Measure a held-out set on all ranks."""
    world, objective, loader = engine.world, held_out.objective, held_out.loader
    total = weight = 0.0
    sums = dict.fromkeys(objective.metric_sum_names, 0.0)
    blocks = np.zeros((2, min(loader.total_sequences, MAX_BLOCKS)))
    sources = np.zeros((2, len(loader.source_names)))
    engine.model.eval()
    with engine.result_weights():
        # The set counts as one batch: its statistics must not depend on ranks and micro-batches.
        batches = (batch for _, batch in _batches(engine, loader))
        statistics = begin_step(engine, objective, batches)
        for step, batch in _batches(engine, loader):
            output = compute_loss(engine, objective, batch, statistics)
            total, weight = total + float(output.loss), weight + output.weight
            for name in sums:
                sums[name] += float(output.metric_sums[name])
            positions = objective.item_positions(batch)
            losses = output.item_losses.double().cpu().numpy()
            sequences = np.array(batch.sequences)[batch.sequences_at(positions)]
            _add(blocks, sequences % blocks.shape[1], losses)
            _add(sources, loader.sources_at(step, batch, positions), losses)
    arrays = [*blocks.ravel().tolist(), *sources.ravel().tolist()]
    total, weight, *totals = world.sum([total, weight, *sums.values(), *arrays])
    weight, count = max(1.0, weight), len(sums)
    metrics = objective.metrics(dict(zip(sums, totals[:count], strict=True)), weight)
    block_losses, items = np.reshape(totals[count : count + blocks.size], blocks.shape).tolist()
    sources = np.reshape(totals[count + blocks.size :], sources.shape)
    by_source = _by_source(loader.source_names, sources)
    if OBJECTIVES[objective.settings.kind].sums_token_losses:
        metrics["perplexity"] = perplexity(total / weight)
        for figures in by_source.values():
            figures["perplexity"] = perplexity(figures["loss"])
    return HeldOutResult(total / weight, metrics, block_losses, items, by_source)


def perplexity(loss: float) -> float:
    """The exponential of a mean cross-entropy; infinite where it has no float."""
    return exp(loss) if loss < MAX_EXPONENT else inf


def _by_source(names: list[str], sums: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Mean loss and number of items of each of several sources, from sums [2, S]."""
    if len(names) == 1:
        return {}
    pairs = zip(names, *sums.tolist(), strict=True)
    return {name: {"loss": total / max(items, 1.0), "items": items} for name, total, items in pairs}


def _batches(engine: Engine, loader: Loader) -> Iterator[tuple[int, MicroBatch]]:
    """This rank's micro-batches of a held-out set, each with its step."""
    world, micro_batch = engine.world, engine.stage.train.micro_batch
    for step in range(loader.steps):
        for batch in loader.micro_batches(step, world.rank, world.size, micro_batch):
            yield step, batch


def _add(sums: NDArray[np.float64], groups: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
    """Add losses [n] to the sums of losses and of items [2, G] of their groups [n]."""
    np.add.at(sums[0], groups, losses)
    np.add.at(sums[1], groups, 1.0)


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
        self._watched = watched_set(train, sets)

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
        stage.evaluated_step, stage.held_out, stage.score = stage.step, {}, None
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
        if self._watched is not None:
            stage.score = self.score(measured[self._watched])
            self._compare_with_best(stage)
        sources = {
            name: {source: sums["loss"] for source, sums in result.sources.items()}
            for name, result in measured.items()
            if result.sources
        }
        more = {"held_out_metrics": metrics, "held_out_sources": sources}
        return {"held_out": losses} | {key: value for key, value in more.items() if value}

    def score(self, result: HeldOutResult) -> float | None:
        """What is least for the best model: the loss, or `train.maximize` with its sign changed.

        None if it is not finite.
        """
        metric = self._train.maximize
        score = result.loss if metric is None else -result.metrics[metric]
        return score if isfinite(score) else None

    def _compare_with_best(self, stage: StageProgress) -> None:
        score, best = stage.score, stage.best_held_out
        is_best = score is not None and (best is None or score < best)
        stage.best_held_out = score if is_best else best
        stage.evaluations_without_best = 0 if is_best else stage.evaluations_without_best + 1
        patience = self._train.early_stopping_patience
        if patience is not None and stage.evaluations_without_best >= patience:
            metric = f"held-out {self._train.maximize or 'loss'}"
            say(f"step {stage.step}: no better {metric} in {patience} evaluations: early stop")
            stage.ended_early = True

    def measured(self, stage: StageProgress) -> dict[str, Any]:
        """What a checkpoint records of the watched set; empty if it was not evaluated at its step.

        The names are those of `dtrain.checkpoints.folder`.
        """
        if stage.evaluated_step != stage.step or self._watched not in stage.held_out:
            return {}
        return self._record(stage.held_out[self._watched], stage.score)

    def measure_last(self, engine: Engine, stage: StageProgress) -> dict[str, Any]:
        """As `measured`, for the last step: the watched set is evaluated now if it was not."""
        assert self._watched is not None
        if record := self.measured(stage):
            return record
        result = evaluate(engine, self._sets[self._watched])
        return self._record(result.loss if isfinite(result.loss) else None, self.score(result))

    def _record(self, loss: float | None, score: float | None) -> dict[str, Any]:
        assert self._watched is not None
        watched = {
            "set": self._watched,
            "rows": self._sets[self._watched].loader.dataset.fingerprint,
            "metric": self._train.maximize or "loss",
        }
        return {LOSS: loss, SCORE: score, WATCHED: watched}


def watched_set(train: Train, sets: Iterable[str]) -> str | None:
    """The set that decides on early stopping and on the best checkpoint; None without sets."""
    return train.evaluate_on or next(iter(sets), None)


def check_maximized(train: Train, objectives: Mapping[str, Objective]) -> None:
    """Check that the watched set reports the metric `train.maximize`.

    Args:
        objectives: of the evaluation sets, by name.

    Raises:
        UserError: it does not.
    """
    name = watched_set(train, objectives)
    if train.maximize is None or name is None:
        return
    objective = objectives[name]
    known = objective.metrics(dict.fromkeys(objective.metric_sum_names, 0.0), 1.0)
    if train.maximize not in known:
        fix = f"use one of {', '.join(known)}" if known else "remove it: the lowest loss is best"
        message = f"the evaluation set {name} does not report {train.maximize}"
        raise UserError(message, where="train.maximize", fix=fix)
