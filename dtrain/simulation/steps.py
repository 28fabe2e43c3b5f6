"""Two optimizer steps: one that makes the optimizer's state, one whose peaks count."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dtrain.config.schema import Stage
from dtrain.data.loader import MicroBatch
from dtrain.engines.base import Engine, decoder_layers
from dtrain.models.dropout import set_dropout_key
from dtrain.objectives.base import build_objective
from dtrain.simulation.ledger import GRADIENTS, OPTIMIZER, Ledger
from dtrain.training.train_step import compute_loss

OUTSIDE, FIRST, INNER, LAST = "outside", "first layer", "inner layers", "last layer"


class Places:
    """Where in a model the computation is.

    A kind of place (outside the decoder layers, in the first, the last or another) and the name of
    the module that computes; in the backward pass without recomputation that of the layer.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[nn.Module | None, str]] = []
        self._kinds: dict[nn.Module | None, str] = {}

    def here(self) -> tuple[str, str]:
        """The kind of place, and the module."""
        module, name = self._stack[-1] if self._stack else (None, "")
        return self._kinds.get(module, OUTSIDE), name

    def leave(self) -> None:
        """A phase is over."""
        self._stack.clear()

    def follow(self, model: nn.Module) -> None:
        """Hear of every module of a model that computes; before an engine changes its classes."""
        blocks = decoder_layers(model)
        for number, block in enumerate(blocks):
            kind = LAST if number == len(blocks) - 1 else FIRST if number == 0 else INNER
            self._kinds |= dict.fromkeys(block.modules(), kind)
        for name, module in model.named_modules():
            inside = module in self._kinds
            if inside or not list(module.children()):
                self._hear_forward(module, name)
            if module in blocks or not inside:
                self._hear_backward(module, name)

    def _hear_forward(self, module: nn.Module, name: str) -> None:
        def enter(*_: Any) -> None:
            self._stack.append((module, name))

        def leave(*_: Any) -> None:
            while self._stack and self._stack.pop()[0] is not module:
                pass  # what recomputation broke off never left

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _hear_backward(self, module: nn.Module, name: str) -> None:
        """A gradient has reached what the module made."""

        def arrived(gradient: Tensor) -> None:
            self._stack[:] = [(module, name)]

        def hear(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            is_recomputed = torch._C._current_graph_task_id() != -1
            if torch.is_tensor(first) and first.requires_grad and not is_recomputed:
                first.register_hook(arrived)

        module.register_forward_hook(hear)


@dataclass
class Simulated:
    """An engine and what its steps are told to.

    Attributes:
        told: called when a phase is over.
    """

    engine: Engine
    stage: Stage
    ledger: Ledger
    places: Places
    mode: FakeTensorMode
    micro_batches: int
    told: Callable[[], None]

    def run(self) -> None:
        """Warm up, then a step whose peaks the ledger keeps."""
        self.engine.model.train()
        # DDP sorts its buckets anew after the first gradient that it sends, looking at numbers.
        self.step([self.engine.recipe.engine.kind != "ddp"])
        self.ledger.forget_peaks()
        self.step([number == self.micro_batches - 1 for number in range(self.micro_batches)])

    def step(self, lasts: list[bool]) -> None:
        """An optimizer step; `lasts`: for each micro-batch, whether its gradient is sent."""
        with self.mode, self.ledger:
            for number, last in enumerate(lasts):
                self.micro_batch(number, last)
            self.phase("update", lambda: self.engine.step(1e-4))

    def micro_batch(self, number: int, last: bool) -> None:
        """Forward and backward."""
        train, tokens = self.stage.train, self.stage.data.sequence_length
        count = train.micro_batch
        numbers = [number * count + i for i in range(count)]
        set_dropout_key(self.engine.bare, 0, 0, numbers, [tokens] * count)
        self.engine.before_forward(last=last)
        batch = batch_of(count, tokens, numbers)
        objective = build_objective(self.stage)
        loss = self.phase("forward", lambda: compute_loss(self.engine, objective, batch).loss)
        self.phase("backward", lambda: self.engine.backward(loss, last=last))

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """One part of a step, and what it leaves behind."""
        self.ledger.phase = name
        result = work()
        gc.collect()  # what is alive, not what Python has not looked at yet
        self.ledger.name(self.gradients(), GRADIENTS)
        self.ledger.name(self.states(), OPTIMIZER)
        self.ledger.end_phase()
        self.places.leave()
        self.told()
        return result

    def gradients(self) -> list[Tensor]:
        """As far as parameters have them."""
        return [p.grad for _, p in self.engine.trainable if p.grad is not None]

    def states(self) -> list[Tensor]:
        """The optimizer's tensors."""
        optimizer: Any = getattr(self.engine, "optimizer", None)
        if optimizer is None:
            return []
        return [
            t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)
        ]


def batch_of(count: int, tokens: int, numbers: list[int]) -> MicroBatch:
    """`count` sequences of one document each; every token but the last is learnt."""
    whole = count * tokens
    ids = torch.zeros(1, whole, dtype=torch.int64)
    places = torch.zeros(1, whole, dtype=torch.int64)
    every = torch.zeros(whole - 1, dtype=torch.int64)
    return MicroBatch(ids, places, every, ids[0, 1:], [tokens] * count, numbers, [tokens] * count)
