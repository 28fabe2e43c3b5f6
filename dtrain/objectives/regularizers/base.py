"""A term that is added to the loss of any objective, as an objective around that objective:
against forgetting, or of the stage's method.

The training loop sees one objective. The term is a mean over the global batch or a function of the
weights, so ranks and micro-batches do not change it. Held-out sets are measured without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dtrain.config.schema import Stage
from dtrain.core.lazy_import import import_object
from dtrain.data.loader import MicroBatch
from dtrain.data.packed_dataset import BatchCounts
from dtrain.distributed.world import World
from dtrain.objectives.base import (
    LossOutput,
    Objective,
    ShardedModel,
    StageContext,
    build_objective,
)

TERM = "regularization"


class AddedTerm(Objective):
    """An objective with a term; `loss` is all that a subclass must add.

    Attributes:
        term: its name in the metrics, where it is multiplied by its weight: the loss without it is
            the rest.
        inner: the objective without it.
    """

    term: ClassVar[str] = TERM

    def __init__(self, stage: Stage, inner: Objective) -> None:
        super().__init__(stage)
        self.inner = inner
        self.metric_sum_names = (*inner.metric_sum_names, self.term)

    def begin_stage(self, context: StageContext) -> None:
        self.inner.begin_stage(context)
        self.stored, self.loader = self.inner.stored, context.loader

    def start_values(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        return self.inner.start_values(model, batch)

    def begin_training(self, engine: ShardedModel) -> None:
        self.inner.begin_training(engine)

    def begin_step(self, model: nn.Module, batches: Iterable[MicroBatch], world: World) -> Any:
        return self.inner.begin_step(model, batches, world)

    def before_update(self, engine: ShardedModel) -> None:
        self.inner.before_update(engine)

    def after_update(self, engine: ShardedModel, step: int, *, updated: bool) -> None:
        self.inner.after_update(engine, step, updated=updated)

    def weight(self, counts: BatchCounts) -> int:
        return self.inner.weight(counts)

    def item_positions(self, batch: MicroBatch) -> NDArray[np.int64]:
        return self.inner.item_positions(batch)

    def metrics(self, sums: Mapping[str, float], weight: float) -> dict[str, float]:
        inner = {name: sums[name] for name in self.inner.metric_sum_names}
        term = {self.term: sums[self.term] / weight} if self.term in sums else {}
        return self.inner.metrics(inner, weight) | term

    def step(self, batch: MicroBatch) -> int:
        """The step of a micro-batch."""
        return batch.sequences[0] // self.loader.global_batch

    def add_term(self, output: LossOutput, loss: Tensor, term: Tensor) -> LossOutput:
        """The output of an objective with the term.

        Args:
            loss: the objective's, through which the term's gradient may already flow.
            term: to add to it; its sum over the global batch is divided as the loss is.
        """
        sums = {**output.metric_sums, self.term: term.detach()}
        return replace(output, loss=loss + term, metric_sums=sums)


class Regularized(AddedTerm):
    """An objective with a term against forgetting.

    Attributes:
        regularize: settings of the term.
    """

    def __init__(self, stage: Stage, inner: Objective) -> None:
        super().__init__(stage, inner)
        assert stage.regularize is not None
        self.regularize = stage.regularize


def build_stage_objective(stage: Stage) -> Objective:
    """What a stage minimizes, with its term against forgetting and that of its method, if any."""
    objective, traits, paths = build_objective(stage), stage.method.traits, list[str]()
    if stage.regularize is not None:
        term = stage.regularize.traits
        paths.append(term.of_base_parameters if traits.trains_base else term.implementation)
    if traits.objective:
        paths.append(traits.objective)
    if stage.method.trains_router:
        paths.append("dtrain.objectives.regularizers.router_balance:RouterBalance")
    for path in paths:
        implementation: type[AddedTerm] = import_object(path)
        objective = implementation(stage, objective)
    return objective
