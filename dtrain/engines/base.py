"""The protocol of an engine, what the engines share, and how one is built.

An engine owns the optimizer and this rank's shards of the trainable parameters. Every engine
averages gradients over the ranks, so the training step multiplies the loss by their number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dtrain.checkpoints.parameter_shards import GRADIENT, ParameterShard
from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.checks import unsupported_by_engine
from dtrain.config.engines import ENGINES
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.config.schema import Recipe, Stage
from dtrain.core.lazy_import import import_object
from dtrain.core.log import progress
from dtrain.distributed.collective_timer import CollectiveTimer
from dtrain.distributed.world import World
from dtrain.engines.optimizers import (
    result_weight,
    set_learning_rate,
    set_update_count,
    set_updates_done,
    state_tensors,
    with_average,
)
from dtrain.models.compute_dtype import limit_autocast
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.load import resolve_dtype
from dtrain.models.training_flops import training_flops_per_token

MaterializeFn = Callable[[nn.Module], None]
"""Allocates and loads the parameters of a block that have no storage yet."""


class Engine(ABC):
    """A model in training on all ranks.

    Attributes:
        model: called for a forward pass.
        module: the same model without the engine's wrapping, for names and settings.
        replica: index of this rank among the ranks with the same parameter shards, and their
            number; each of them saves a share.
        update_count: optimizer updates so far, without skipped ones.
        rate_square_sum: of their learning rates, the weights of schedule-free's average.
        kept: what an objective keeps of this rank's parameter shards in checkpoints: parameter →
            kind → 1-D tensor.
        flops_per_token: of a training step, or None; see `training_flops_per_token`.
        collectives: measures this rank's time in them.
    """

    model: Any  # the wrappers of torch and DeepSpeed share no type
    module: nn.Module
    replica: tuple[int, int] = (0, 1)

    def __init__(self, module: nn.Module, recipe: Recipe, stage: Stage, world: World) -> None:
        self.module, self.recipe, self.stage, self.world = module, recipe, stage, world
        self.compute_dtype = resolve_dtype(recipe.model.dtype, world.device)
        self.update_count, self.rate_square_sum = 0, 0.0
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.flops_per_token = training_flops_per_token(module)
        self.collectives = CollectiveTimer()
        self.collectives.start()

    def before_forward(self, *, last: bool) -> None:
        """Called before the forward pass of each micro-batch; `last` of this optimizer step."""
        return

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch; `last` of this optimizer step."""

    def autocast(self) -> AbstractContextManager[object]:
        """Computes in the recipe's dtype; trainable parameters stay float32 outside."""
        return nullcontext()

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip and update; with a non-finite gradient norm skip the update and drop the gradient.

        Returns:
            The global gradient norm before clipping; NaN or infinite if the update is skipped.
        """

    def begin_update(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Set what the optimizer's next update depends on in addition to the gradient."""
        set_learning_rate(optimizer, learning_rate)
        set_updates_done(optimizer, self.update_count, self.rate_square_sum)

    def count_update(self, learning_rate: float) -> None:
        """Count an update that was not skipped."""
        self.update_count += 1
        self.rate_square_sum += learning_rate**2

    @property
    @abstractmethod
    def updated(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimizer and this rank's float32 tensors that it updates."""

    def on_weights_changed(self) -> None:
        """Called after weights that train were changed outside a step, on all ranks."""
        return

    @contextmanager
    def result_weights(self) -> Iterator[None]:
        """Compute inside with the weights that the stage's results have.

        They are those that train, or their average where the optimizer has one.
        """
        if not (OPTIMIZERS[self.stage.train.optimizer].averages and self.update_count):
            yield
            return
        optimizer, weights = self.updated
        training = [weight.detach().clone() for weight in weights]
        for weight in weights:
            weight.data.copy_(result_weight(optimizer, weight))
        self.on_weights_changed()
        yield  # after an error the run ends: restoring would wait for other ranks
        for weight, value in zip(weights, training, strict=True):
            weight.data.copy_(value)  # to the bit: an evaluation must not change the training
        self.on_weights_changed()

    @abstractmethod
    def parameter_shards(self, *, gradients: bool = False) -> Iterator[ParameterShard]:
        """This rank's range of every trainable parameter, with its optimizer state (views).

        Args:
            gradients: with the gradient of the global batch instead, before it is clipped; between
                the last `backward` and `step`. A parameter that the loss does not reach has none.
        """

    def saved_shards(self) -> Iterator[ParameterShard]:
        """The `parameter_shards`, with what an objective keeps of them."""
        for shard in self.parameter_shards():
            yield replace(shard, tensors=shard.tensors | self.kept.get(shard.name, {}))

    def drop_gradient(self) -> None:
        """Drop the gradient without an update."""
        for shard in self.parameter_shards(gradients=True):
            if GRADIENT in shard.tensors:
                shard.tensors[GRADIENT].fill_(float("nan"))
        self.step(0.0)

    def on_state_loaded(self, update_count: int, rate_square_sum: float = 0.0) -> None:
        """Called after a checkpoint was copied into `parameter_shards()`.

        Args:
            update_count: of the checkpoint, for Adam's bias correction.
            rate_square_sum: the same, for schedule-free's average.
        """
        self.update_count, self.rate_square_sum = update_count, rate_square_sum
        self.on_weights_changed()

    def load(self, checkpoint: Checkpoint) -> None:
        """Replace the trained weights and the optimizer's state by a checkpoint's, in place.

        Raises:
            UserError: it does not fit the model, or a value is not finite.
        """
        checkpoint.restore(self.saved_shards())
        state = checkpoint.state
        self.on_state_loaded(state["updates"], state.get("rate_square_sum", 0.0))

    def close(self) -> None:
        """Release the wrapper and its buffers."""
        self.model = None
        self.collectives.stop()

    @property
    def trainable_names(self) -> list[str]:
        """Names of `trainable`."""
        return [name for name, _ in self.trainable]

    @cached_property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and trainable parameters; cached, because it walks over all modules."""
        return [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]


class TorchEngine(Engine):
    """Base of ddp and fsdp2: torch's optimizer, clipping and per-parameter state."""

    optimizer: torch.optim.Optimizer

    def __init__(self, module: nn.Module, recipe: Recipe, stage: Stage, world: World) -> None:
        super().__init__(module, recipe, stage, world)
        if self.uses_autocast:
            trains_base = stage.method.traits.trains_base
            limit_autocast(module, world.device, self.compute_dtype, base_trains=trains_base)

    @property
    def uses_autocast(self) -> bool:
        """Whether what trains is wider than the compute dtype in the forward pass."""
        return self.compute_dtype != torch.float32

    @cached_property
    def local_params(self) -> list[nn.Parameter]:
        """This rank's part of each of `trainable`, which its optimizer updates: here all of it."""
        return [p for _, p in self.trainable]

    def norm_over_ranks(self, norm: Tensor) -> Tensor:
        """The global gradient norm, from the norm over `local_params`."""
        return norm

    def autocast(self) -> AbstractContextManager[object]:
        enabled = self.uses_autocast
        return torch.autocast(self.world.device.type, self.compute_dtype, enabled=enabled)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        gradients = [p.grad for p in self.local_params if p.grad is not None]
        norm = self.norm_over_ranks(get_total_norm(gradients))
        value = float(norm)
        if isfinite(value):
            clip_grads_with_norm_(self.local_params, self.stage.train.max_grad_norm, norm)
            self.begin_update(self.optimizer, learning_rate)
            self.optimizer.step()
            self.count_update(learning_rate)
        self.optimizer.zero_grad()
        return value

    def parameter_shards(self, *, gradients: bool = False) -> Iterator[ParameterShard]:
        for (name, parameter), local in zip(self.trainable, self.local_params, strict=True):
            views: dict[str, Tensor | None] = {"weight": local.data}
            if gradients:
                views[GRADIENT] = local.grad
            else:
                views |= state_tensors(self.optimizer, local, self.stage)
            start, stop = self.flat_range(parameter)
            tensors = {kind: v.reshape(-1) for kind, v in views.items() if v is not None}
            tensors = with_average(tensors)
            yield ParameterShard(name, tuple(parameter.shape), start, stop, tensors)

    def flat_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """This rank's range of the flattened parameter."""
        return 0, parameter.numel()

    @property
    def updated(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        return self.optimizer, list(self.local_params)

    def on_state_loaded(self, update_count: int, rate_square_sum: float = 0.0) -> None:
        super().on_state_loaded(update_count, rate_square_sum)
        for local in self.local_params:
            set_update_count(self.optimizer, local, update_count)


def materialize_blocks(model: nn.Module, materialize: MaterializeFn) -> Iterator[nn.Module]:
    """Yield each decoder layer, then the whole model, materialized just before.

    An engine that shards a block before it asks for the next one needs memory for one block.
    """
    blocks = [*decoder_layers(model), model]
    with progress("loading the base model", len(blocks)) as bar:
        for block in blocks:
            materialize(block)
            yield block
            bar.advance()


def build_engine(
    model: nn.Module, recipe: Recipe, stage: Stage, world: World, materialize: MaterializeFn
) -> Engine:
    """Wrap `model` in the engine that the resolved recipe names.

    Args:
        materialize: loads blocks of the model that have no storage yet.

    Raises:
        UserError: the engine does not support what the recipe asks for, or the number of ranks.
    """
    for clash in unsupported_by_engine(recipe):  # a launcher may have chosen the engine
        raise clash
    capabilities = ENGINES[recipe.engine.kind]
    path = capabilities.implementation
    if recipe.determinism == "strict":
        assert capabilities.strict_implementation
        path = capabilities.strict_implementation
    # Imported by name, so that a run under ddp does not pay for importing DeepSpeed.
    engine: Engine = import_object(path)(model, recipe, stage, world, materialize)
    return engine
