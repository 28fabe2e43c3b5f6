"""The protocol of an engine, and what all of them share.

An engine owns the optimizer and the ranks' shares of what trains. Every engine averages the
gradient over the ranks, so the loop hands it `ranks x` the loss it wants differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from math import isfinite
from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from dtrain.checkpoints.parameter_shards import ParameterShard
from dtrain.config.schema import Recipe, Stage
from dtrain.core.log import progress
from dtrain.distributed.world import World
from dtrain.models.load import resolve_dtype

ADAM_KINDS = ("exp_avg", "exp_avg_sq")
EIGHT_BIT_KINDS = ("state1", "state2", "absmax1", "absmax2")
OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
}


Fill = Callable[[nn.Module], None]
"""Gives the parameters of a block that have no storage yet their values."""


class Engine(ABC):
    """A model that trains on all ranks.

    Attributes:
        model: what is called for a forward pass.
        bare: the same model without the engine's wrapping, for names and settings.
        copy: which of how many ranks this is that hold the same pieces; they share a save.
    """

    model: Any  # the wrappers of torch and DeepSpeed share no type
    bare: nn.Module
    copy: tuple[int, int] = (0, 1)

    def __init__(self, bare: nn.Module, recipe: Recipe, stage: Stage, world: World) -> None:
        self.bare, self.recipe, self.stage, self.world = bare, recipe, stage, world
        self.compute_dtype = resolve_dtype(recipe.model.dtype, world.device)
        self.updates = 0  # optimizer steps taken, without the skipped ones

    def before_forward(self, *, last: bool) -> None:
        """Told before each micro-batch of a step; `last` of them."""
        return

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch; `last` of this optimizer step."""

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the recipe's dtype; what trains stays float32 outside."""
        return nullcontext()

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip and update; a non-finite gradient norm skips the update and forgets the gradient.

        Returns:
            The global gradient norm before clipping; NaN or infinite if the update was skipped.
        """

    @abstractmethod
    def pieces(self) -> Iterator[ParameterShard]:
        """This rank's range of every parameter that trains, with its optimizer state (views)."""

    @abstractmethod
    def set_updates(self, updates: int) -> None:
        """Set the optimizer's step counter (Adam's bias correction) after a restore."""

    def restored(self) -> None:
        """Take over what was copied into the pieces, where the engine computes with copies."""
        return

    def close(self) -> None:
        """Let go of the wrapper and what it holds."""
        self.model = None

    @cached_property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of what trains; a walk over all modules, so it is made once."""
        return [(n, p) for n, p in self.bare.named_parameters() if p.requires_grad]


class TorchEngine(Engine):
    """What ddp and fsdp2 share: torch's optimizer, clipping and per-parameter state."""

    optimizer: torch.optim.Optimizer

    @cached_property
    def owned(self) -> list[nn.Parameter]:
        """What this rank's optimizer updates of each of `trainable`: all of it."""
        return [p for _, p in self.trainable]

    def norm_over_ranks(self, norm: Tensor) -> Tensor:
        """The gradient's norm, from that of what this rank owns."""
        return norm

    def autocast(self) -> AbstractContextManager[object]:
        dtype = self.compute_dtype
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        gradients = [p.grad for p in self.owned if p.grad is not None]
        norm = self.norm_over_ranks(get_total_norm(gradients))
        value = float(norm)
        if isfinite(value):
            clip_grads_with_norm_(self.owned, self.stage.train.max_grad_norm, norm)
            set_learning_rate(self.optimizer, learning_rate)
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return value

    def pieces(self) -> Iterator[ParameterShard]:
        for (name, parameter), own in zip(self.trainable, self.owned, strict=True):
            views = {"weight": own.data, **self.optimizer_tensors(own)}
            start, stop = self.flat_range(parameter)
            tensors = {kind: view.reshape(-1) for kind, view in views.items()}
            yield ParameterShard(name, tuple(parameter.shape), start, stop, tensors)

    def flat_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """This rank's range of the flattened parameter."""
        return 0, parameter.numel()

    def optimizer_tensors(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's tensors of a parameter, by the kind that a checkpoint knows them by."""
        state = adam_state(self.optimizer, parameter)
        if isinstance(self.optimizer, Optimizer8bit):
            return {f"bnb_{kind}": state[kind] for kind in EIGHT_BIT_KINDS if kind in state}
        return {kind: state[kind] for kind in ADAM_KINDS}

    def set_updates(self, updates: int) -> None:
        self.updates = updates
        for own in self.owned:
            state = adam_state(self.optimizer, own)
            # torch counts in a tensor, bitsandbytes in a number
            state["step"] = (
                torch.full_like(state["step"], updates)
                if torch.is_tensor(state["step"])
                else updates
            )


def filled_blocks(model: nn.Module, fill: Fill) -> Iterator[nn.Module]:
    """Each decoder layer, then the whole model, filled just before it is given out.

    An engine that keeps a share of a block before it asks for the next holds one at a time.
    """
    blocks = [*decoder_layers(model), model]
    with progress("loading the base", len(blocks)) as bar:
        for block in blocks:
            fill(block)
            yield block
            bar.advance()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost blocks that transformers says must not be split.

    Embeddings are not among them, though some types name theirs: the matrix may be the output
    matrix too, and an engine that shards by block cannot put it into two.
    """
    names = {
        name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())
    }
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    embeddings = base.get_input_embeddings() if base else None
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    blocks = [m for m in blocks if all(child is not embeddings for child in m.modules())]
    inner = {child for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if block not in inner]


def build_optimizer(parameters: list[nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over what trains; weight decay on matrices only."""
    train = stage.train
    groups = [
        {"params": [p for p in parameters if is_matrix(p)], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if not is_matrix(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One pass through memory where the other makes ten, and one call on a GPU for many tensors.
    fits = train.optimizer == "adamw" and all(p.is_cpu or p.is_cuda for p in parameters)
    own = {"fused": True} if fits else {}
    return OPTIMIZERS[train.optimizer](groups, lr=train.learning_rate, **own)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter has two dimensions or more; under ZeRO-3 only DeepSpeed knows them."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Adam's state of a parameter, made as at the first step if it is not there."""
    state: dict[str, Any] = optimizer.state[parameter]
    if not state and isinstance(optimizer, Optimizer8bit):
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        optimizer.init_state(group, parameter, 0, 0)
    elif not state:
        # the fused one reads its counter where the parameter lies
        place = parameter.device if optimizer.defaults.get("fused") else None
        state["step"] = torch.zeros((), dtype=torch.float32, device=place)
        for kind in ADAM_KINDS:
            state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
