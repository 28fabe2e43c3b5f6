"""One optimizer step: the global batch forward and backward, then one update.

The loss is the sum over the supervised tokens of the global batch divided by their number, so
it does not depend on how rows fall on ranks and micro-batches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Protocol

import numpy as np
import torch

from dtrain.data.loader import Loader, MicroBatch
from dtrain.distributed.memory import send
from dtrain.distributed.world import World
from dtrain.engines.base import Engine
from dtrain.models.dropout import set_dropout_key
from dtrain.models.loss import supervised_losses
from dtrain.training.callbacks import Callback


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        loss: mean over the supervised tokens of the global batch, before the update.
        grad_norm: global, before clipping.
        stop_votes: ranks that ask to stop.
        source_losses: summed over the supervised tokens of each of several sources.
        seconds: of this rank, by what they were spent on.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    stop_votes: int
    source_losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether the update was taken."""
        return isfinite(self.loss) and isfinite(self.grad_norm)


class StepInputs(Protocol):
    """What a step needs of a trainer."""

    engine: Engine
    loader: Loader
    seed: int
    callbacks: Callback


def train_step(trainer: StepInputs, step: int, rate: float, *, wants_stop: bool) -> StepResult:
    """Train on the global batch of `step` with learning rate `rate`."""
    started = time.perf_counter()
    engine, loader = trainer.engine, trainer.loader
    world, train = engine.world, engine.stage.train
    batches = list(loader.micro_batches(step, world.rank, world.size, train.micro_batch))
    supervised = loader.supervised_tokens(step)
    loaded = time.perf_counter()
    scale = world.size / max(1, supervised)  # engines average over ranks
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    losses: list[torch.Tensor] = []
    if not engine.bare.training:  # after an evaluation; it walks over all modules
        engine.model.train()
    for number, batch in enumerate(batches):
        trainer.callbacks.pre_micro_batch(step + 1, number + 1, len(batches))
        set_dropout_key(engine.bare, trainer.seed, step, batch.sequences, batch.sequence_lengths)
        last = number == len(batches) - 1
        engine.before_forward(last=last)
        loss, each = forward_losses(engine, batch)
        loss = poisoned(loss)
        engine.backward(loss * scale, last=last)
        total += loss.detach().double()
        losses.append(each)
    loss_here = total.item()
    here_by_source = losses_by_source(loader, step, batches, losses)
    computed = time.perf_counter()
    trainer.callbacks.pre_optim_step(step + 1)
    norm = engine.step(rate)
    loss_total, votes, *by_source = world.sum([loss_here, float(wants_stop), *here_by_source])
    return StepResult(
        loss=loss_total / max(1, supervised),
        grad_norm=norm,
        learning_rate=rate,
        tokens=loader.tokens(step),
        supervised_tokens=supervised,
        stop_votes=int(votes),
        source_losses=by_source,
        seconds={
            "data": loaded - started,
            "compute": computed - loaded,
            "update": time.perf_counter() - computed,
        },
    )


def losses_by_source(
    loader: Loader, step: int, batches: list[MicroBatch], losses: list[torch.Tensor]
) -> list[float]:
    """This rank's sum of the losses of each source; nothing where there is one source.

    Args:
        losses: of each target [K], a tensor for each micro-batch.
    """
    names = loader.source_names
    if len(names) == 1:
        return []
    which = np.concatenate([loader.target_sources(step, batch) for batch in batches])
    each = torch.cat(losses).double().cpu().numpy()
    found: list[float] = np.bincount(which, each, minlength=len(names)).tolist()
    return found


def forward_loss(engine: Engine, batch: MicroBatch) -> torch.Tensor:
    """Summed cross-entropy of a micro-batch, float32."""
    return forward_losses(engine, batch)[0]


def forward_losses(engine: Engine, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of a micro-batch, summed, and of each target [K], which has no gradient."""
    batch = on_device(batch, engine.world.device)
    with engine.autocast():
        return supervised_losses(engine.model, batch)


def poisoned(loss: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is NaN where it is not finite itself.

    An infinite loss may have a finite gradient; engines skip an update by the gradient's norm.
    """
    one_or_nan = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
    return loss * one_or_nan


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on `device`."""
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        name: send(value, device) for name, value in vars(batch).items() if torch.is_tensor(value)
    }
    return replace(batch, **moved)


@torch.no_grad()
def held_out_loss(engine: Engine, loader: Loader) -> float:
    """Mean loss over all supervised tokens of a held-out set, on all ranks."""
    world: World = engine.world
    micro = engine.stage.train.micro_batch
    total, tokens = 0.0, 0
    engine.model.eval()
    for step in range(loader.steps):
        for batch in loader.micro_batches(step, world.rank, world.size, micro):
            total += float(forward_loss(engine, batch))
        tokens += loader.supervised_tokens(step)
    return world.sum([total])[0] / max(1, tokens)
