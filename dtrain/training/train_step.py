"""One optimizer step: the global batch forward and backward, then one update.

The loss is the objective's sum over the global batch divided by the weight of the global batch
(the number of targets, or of pairs; of sources with a loss weight, the sum of their factors over
the targets), so it does not depend on how sequences are split over ranks and micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Protocol

import numpy as np
import torch

from dtrain.data.loader import NO_SEQUENCE, Loader, MicroBatch
from dtrain.engines.base import Engine
from dtrain.models.dropout import set_dropout_key
from dtrain.models.routing import ExpertLoad
from dtrain.objectives.base import LossOutput, Objective, global_weight
from dtrain.training.callbacks import Callback


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        loss: weighted mean over the global batch, before the update.
        grad_norm: global, before clipping.
        stop_votes: ranks that ask to stop.
        metrics: of the objective, over the global batch.
        sources: counts and mean loss of each source, where there are several.
        experts: load of the experts of each layer that has some, over the global batch.
        seconds: of this rank, by what they were spent on.
        communication_seconds: of this rank in collectives, a part of `seconds`.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    stop_votes: int
    metrics: dict[str, float] = field(default_factory=dict)
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    experts: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    communication_seconds: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether the update was taken."""
        return isfinite(self.loss) and isfinite(self.grad_norm)


class StepInputs(Protocol):
    """What a step needs of a trainer."""

    engine: Engine
    objective: Objective
    loader: Loader
    expert_load: ExpertLoad
    seed: int
    callbacks: Callback


def train_step(trainer: StepInputs, step: int, rate: float, *, wants_stop: bool) -> StepResult:
    """Train on the global batch of `step` with learning rate `rate`."""
    started = time.perf_counter()
    engine, objective, loader = trainer.engine, trainer.objective, trainer.loader
    world, train = engine.world, engine.stage.train
    engine.collectives.take()  # of an evaluation or a save
    batches = list(loader.micro_batches(step, world.rank, world.size, train.micro_batch))
    counts = loader.counts(step)
    weight = global_weight(objective, loader, step)
    loaded = time.perf_counter()
    scale = world.size / weight  # engines average over ranks
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    outputs: list[LossOutput] = []
    if not engine.module.training:  # after an evaluation; it walks over all modules
        engine.model.train()
    statistics = begin_step(engine, objective, batches)
    for number, batch in enumerate(batches):
        trainer.callbacks.pre_micro_batch(step + 1, number + 1, len(batches))
        set_dropout_key(engine.module, trainer.seed, step, batch.sequences, batch.sequence_lengths)
        last = number == len(batches) - 1
        engine.before_forward(last=last)
        with trainer.expert_load.recording(is_empty=NO_SEQUENCE in batch.sequence_ids):
            output = compute_loss(engine, objective, batch, statistics)
        loss = poisoned(output.loss)
        engine.backward(loss * scale, last=last)
        total += loss.detach().double()
        outputs.append(output)
    loss_here = total.item()
    local_sums = source_sums(objective, loader, step, batches, outputs)
    local_sums += metric_sums(objective, outputs)
    loads = trainer.expert_load.take()
    computed = time.perf_counter()
    trainer.callbacks.pre_optim_step(step + 1)
    objective.before_update(engine)
    norm = engine.step(rate)
    objective.after_update(engine, step, updated=isfinite(norm))
    loss_total, votes, *sums = world.sum([loss_here, float(wants_stop), *local_sums, *loads])
    loads, sums = sums[len(local_sums) :], sums[: len(local_sums)]
    sources = source_losses(objective, loader, step, sums)
    metrics = dict(zip(objective.metric_sum_names, sums[len(sources) :], strict=True))
    return StepResult(
        loss=loss_total / weight,
        grad_norm=norm,
        learning_rate=rate,
        tokens=counts.tokens,
        supervised_tokens=counts.supervised_tokens,
        stop_votes=int(votes),
        metrics=objective.metrics(metrics, weight),
        sources=sources,
        experts=trainer.expert_load.metrics(loads),
        seconds={
            "data": loaded - started,
            "compute": computed - loaded,
            "update": time.perf_counter() - computed,
        },
        communication_seconds=engine.collectives.take(),
    )


def begin_step(engine: Engine, objective: Objective, batches: Iterable[MicroBatch]) -> Any:
    """The objective's statistics of the global batch, before the first loss."""
    with engine.autocast():
        return objective.begin_step(engine.model, batches, engine.world)


def compute_loss(
    engine: Engine, objective: Objective, batch: MicroBatch, statistics: Any = None
) -> LossOutput:
    """The objective's loss of a micro-batch, in the engine's compute dtype."""
    batch = batch.to(engine.world.device)
    with engine.autocast():
        return objective.loss(engine.model, batch, statistics)


def source_sums(
    objective: Objective,
    loader: Loader,
    step: int,
    batches: Sequence[MicroBatch],
    outputs: Sequence[LossOutput],
) -> list[float]:
    """This rank's summed item losses of each source; nothing where there is one source."""
    names = loader.source_names
    if len(names) == 1:
        return []
    sources = np.concatenate(
        [loader.sources_at(step, batch, objective.item_positions(batch)) for batch in batches]
    )
    losses = torch.cat([output.item_losses for output in outputs]).double().cpu().numpy()
    sums: list[float] = np.bincount(sources, losses, minlength=len(names)).tolist()
    return sums


def source_losses(
    objective: Objective, loader: Loader, step: int, sums: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Counts of each of several sources in the global batch, and its mean loss where it has any."""
    if len(loader.source_names) == 1:
        return {}
    sources: dict[str, dict[str, float]] = {}
    for (name, counts), total in zip(loader.counts_by_source(step).items(), sums, strict=False):
        columns = asdict(counts)
        del columns["examples"]
        weight = objective.weight(counts)
        sources[name] = columns | ({"loss": total / weight} if weight else {})
    return sources


def metric_sums(objective: Objective, outputs: Sequence[LossOutput]) -> list[float]:
    """This rank's sums for the objective's metrics, in the order of their names."""
    return [
        float(sum(output.metric_sums[name].double() for output in outputs))
        for name in objective.metric_sum_names
    ]


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is NaN where it is not finite itself.

    An infinite loss may have a finite gradient; engines skip an update by the gradient's norm.
    """
    one_or_nan = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
    return loss * one_or_nan
