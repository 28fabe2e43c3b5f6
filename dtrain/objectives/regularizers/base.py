"""A term that is added to the loss of any objective, as an objective around that objective.

The training loop sees one objective. The term is a mean over the global batch or a function of the
weights, so ranks and micro-batches do not change it. Held-out sets are measured without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dtrain.config.schema import Stage
from dtrain.data.loader import BatchCounts, MicroBatch
from dtrain.distributed.world import World
from dtrain.objectives.base import (
    LossOutput,
    Objective,
    ShardedModel,
    StageContext,
    build_objective,
)

TERM = "regularization"
"""Name of the term in the metrics, multiplied by its weight: the loss without it is the rest."""


class Regularized(Objective):
    """An objective with a term; `loss` is all that a subclass must add.

    Attributes:
        inner: the stage's objective.
        regularize: settings of the term.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        assert stage.regularize is not None
        self.inner, self.regularize = build_objective(stage), stage.regularize
        self.metric_sum_names = (*self.inner.metric_sum_names, TERM)

    def begin_stage(self, context: StageContext) -> None:
        self.inner.begin_stage(context)
        self.stored, self.loader = self.inner.stored, context.loader

    def start_values(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        return self.inner.start_values(model, batch)

    def begin_training(self, engine: ShardedModel) -> None:
        self.inner.begin_training(engine)

    def before_update(self, engine: ShardedModel) -> None:
        self.inner.before_update(engine)

    def begin_step(self, model: nn.Module, batches: Iterable[MicroBatch], world: World) -> Any:
        return self.inner.begin_step(model, batches, world)

    def weight(self, counts: BatchCounts) -> int:
        return self.inner.weight(counts)

    def item_positions(self, batch: MicroBatch) -> NDArray[np.int64]:
        return self.inner.item_positions(batch)

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        inner = {name: sums[name] for name in self.inner.metric_sum_names}
        return self.inner.metrics(inner, weight) | {TERM: sums[TERM] / weight}

    def step(self, batch: MicroBatch) -> int:
        """The step of a micro-batch."""
        return batch.sequences[0] // self.loader.global_batch


def add_term(output: LossOutput, loss: Tensor, term: Tensor) -> LossOutput:
    """The output of an objective with a term.

    Args:
        loss: the objective's, through which the term's gradient may already flow.
        term: to add to it; its sum over the global batch is divided as the loss is.
    """
    sums = {**output.metric_sums, TERM: term.detach()}
    return replace(output, loss=loss + term, metric_sums=sums)


def build_stage_objective(stage: Stage) -> Objective:
    """What a stage minimizes, with its term against forgetting if it has one."""
    if stage.regularize is None:
        return build_objective(stage)
    traits, trains_base = stage.regularize.traits, stage.method.traits.trains_base
    path = traits.of_base_parameters if trains_base else traits.implementation
    module, _, name = path.partition(":")
    implementation: type[Regularized] = getattr(import_module(module), name)
    return implementation(stage)
