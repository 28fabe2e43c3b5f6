"""Penalties on the change of the base's own parameters: l2_init, and elastic weight consolidation.

    weight/2 · Σ F (W - W0)²

of every parameter that trains, where W0 is its value at the start of the stage and F is 1, or its
diagonal Fisher information. Each rank keeps W0 and F of its own range, adds weight · F (W - W0) to
the range's gradient before the update, and adds its part of the value to the loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.checkpoints.parameter_shards import GRADIENT
from dtrain.config.regularize import Ewc
from dtrain.config.schema import Stage
from dtrain.data.loader import MicroBatch
from dtrain.distributed.world import World
from dtrain.objectives.base import (
    LossOutput,
    Objective,
    ShardedModel,
    StageContext,
    global_weight,
)
from dtrain.objectives.regularizers.base import Regularized
from dtrain.objectives.regularizers.parameter_fisher import diagonal_fisher


class L2InitOfParameters(Regularized):
    """Half the squared change of the parameters since the start of the stage."""

    def __init__(self, stage: Stage, inner: Objective) -> None:
        super().__init__(stage, inner)
        self.weights: list[Tensor] = []  # views of this rank's ranges
        self.start: list[Tensor] = []  # their values at the start of the stage
        self.factors: list[Tensor | None] = []
        self.remaining = 0.0  # of this rank's part of the value, not yet in a loss

    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.context = context

    def begin_training(self, engine: ShardedModel) -> None:
        super().begin_training(engine)
        _, self.replicas = engine.replica
        self.factors = self.fisher(engine)
        self.weights = [shard.training_weight for shard in engine.parameter_shards()]
        self.start = [weight.clone() for weight in self.weights]

    def fisher(self, engine: ShardedModel) -> list[Tensor | None]:
        """F of each of the engine's parameter shards; None for 1."""
        return [None for _ in engine.parameter_shards()]

    def begin_step(self, model: nn.Module, batches: Iterable[MicroBatch], world: World) -> Any:
        self.remaining = self.local_value()
        return super().begin_step(model, batches, world)

    @torch.no_grad()
    def local_value(self) -> float:
        """This rank's part of the term: the ranks' parts add up to it."""
        total = torch.zeros((), dtype=torch.float64, device=self.context.world.device)
        for change, factor in zip(self.changes(), self.factors, strict=True):
            weighted = change if factor is None else change * factor
            total += (weighted * change).sum(dtype=torch.float64)
        return 0.5 * self.regularize.weight * total.item() / self.replicas

    def changes(self) -> Iterable[Tensor]:
        """W - W0 of each range."""
        return (now - start for now, start in zip(self.weights, self.start, strict=True))

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        output = self.inner.loss(model, batch, statistics)
        weight = global_weight(self.inner, self.loader, self.step(batch))
        term, self.remaining = output.loss.new_tensor(weight * self.remaining), 0.0
        return self.add_term(output, output.loss, term)

    @torch.no_grad()
    def before_update(self, engine: ShardedModel) -> None:
        super().before_update(engine)
        shards = engine.parameter_shards(gradients=True)
        for shard, change, factor in zip(shards, self.changes(), self.factors, strict=True):
            if GRADIENT in shard.tensors:
                penalty = change if factor is None else change * factor
                shard.tensors[GRADIENT].add_(penalty, alpha=self.regularize.weight)


class EwcOfParameters(L2InitOfParameters):
    """Elastic weight consolidation (arXiv:1612.00796) of every parameter."""

    def fisher(self, engine: ShardedModel) -> list[Tensor | None]:
        assert isinstance(self.regularize, Ewc)
        shards = diagonal_fisher(engine, self.context, self.regularize)
        return [shard.training_weight for shard in shards]
