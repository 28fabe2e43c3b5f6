"""The load-balancing loss of a mixture of experts whose routers train (`method.router`).

It is that of the global batch. A step with several micro-batches on a rank first counts, in
forward passes without a gradient, which experts its tokens choose: the gradient of the first
micro-batch already depends on the choices of the last. With a single micro-batch the counts come
from the pass that trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.core.log import say
from dtrain.data.loader import NO_SEQUENCE, MicroBatch
from dtrain.distributed.world import World
from dtrain.models.dropout import set_dropout_key
from dtrain.models.loss import target_losses
from dtrain.models.routing import LoadBalance, RouterSums
from dtrain.objectives.base import LossOutput, ShardedModel, StageContext, global_weight
from dtrain.objectives.regularizers.base import AddedTerm


class RouterBalance(AddedTerm):
    """An objective with the model's load-balancing loss."""

    term = "router_aux_loss"
    balance: LoadBalance

    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.world = context.world

    def begin_training(self, engine: ShardedModel) -> None:
        super().begin_training(engine)
        self.balance = LoadBalance(engine.module)
        if self.balance.obstacle:
            self.metric_sum_names = self.inner.metric_sum_names
            say(f"the routers train without a load-balancing loss: {self.balance.obstacle}")
        else:
            say(f"load-balancing loss of the routers: times {self.balance.coefficient:g}")

    def begin_step(self, model: nn.Module, batches: Iterable[MicroBatch], world: World) -> Any:
        batches = list(batches)
        inner = super().begin_step(model, batches, world)
        choices = None
        if len(batches) > 1 and not self.balance.obstacle:  # the same number on all ranks
            counts = [self.count(model, batch) for batch in batches]
            choices = self.sum_over_ranks(torch.stack(counts).sum(0))
        return inner, choices

    @torch.no_grad()
    def count(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """How many tokens of a micro-batch choose each expert, [E]."""
        step = self.step(batch)
        set_dropout_key(model, self.loader.seed, step, batch.sequences, batch.sequence_lengths)
        none = batch.targets[:0]
        batch = replace(batch, target_positions=none, targets=none, target_weights=None)
        with self.balance.recording() as sums:
            target_losses(model, batch.to(self.world.device))
        return total_choices(sums, batch)

    def sum_over_ranks(self, choices: Tensor) -> Tensor:
        """Counts of the global batch, float64 [E], on the CPU."""
        return torch.tensor(self.world.sum(choices.tolist()), dtype=torch.float64)

    def loss(self, model: nn.Module, batch: MicroBatch, statistics: Any) -> LossOutput:
        inner, choices = statistics
        if self.balance.obstacle:
            return self.inner.loss(model, batch, inner)
        with self.balance.recording() as sums:
            output = self.inner.loss(model, batch, inner)
        if choices is None:
            choices = self.sum_over_ranks(total_choices(sums, batch))
        probabilities = torch.stack([each for _, each in sums]).sum(0) * has_sequences(batch)
        weight = global_weight(self.inner, self.loader, self.step(batch))
        return self.add_term(
            output, output.loss, weight * self.balance.loss(choices, probabilities)
        )


def has_sequences(batch: MicroBatch) -> bool:
    """Whether a micro-batch has sequences: that of a rank without any has two tokens."""
    return NO_SEQUENCE not in batch.sequence_ids


def total_choices(sums: RouterSums, batch: MicroBatch) -> Tensor:
    """Choices of the tokens of a micro-batch, float64 [E]."""
    return torch.stack([each for each, _ in sums]).double().sum(0) * has_sequences(batch)
