"""Simulates two optimizer steps: one that creates the optimizer's state, one that is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from dtrain.config.schema import Stage
from dtrain.data.loader import MicroBatch
from dtrain.engines.base import Engine
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.dropout import set_dropout_key
from dtrain.objectives.base import build_objective
from dtrain.simulation.ledger import GRADIENTS, OPTIMIZER, MemoryLedger
from dtrain.training.train_step import compute_loss

OUTSIDE, FIRST, INNER, LAST = "outside", "first layer", "inner layers", "last layer"


class ModuleTracker:
    """Tracks which part of a model is computing.

    The region is outside the decoder layers, or the first, the last or another layer. The module is
    the one that computes; in the backward pass without recomputation, the decoder layer.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[nn.Module | None, str]] = []
        self._regions: dict[nn.Module | None, str] = {}

    def location(self) -> tuple[str, str]:
        """The region, and the name of the module."""
        module, name = self._stack[-1] if self._stack else (None, "")
        return self._regions.get(module, OUTSIDE), name

    def reset(self) -> None:
        """Forget the modules of the phase that ended."""
        self._stack.clear()

    def follow(self, model: nn.Module) -> None:
        """Hook the modules of a model; must run before an engine changes their classes."""
        blocks = decoder_layers(model)
        for index, block in enumerate(blocks):
            region = LAST if index == len(blocks) - 1 else FIRST if index == 0 else INNER
            self._regions |= dict.fromkeys(block.modules(), region)
        for name, module in model.named_modules():
            inside = module in self._regions
            if inside or not list(module.children()):
                self._hook_forward(module, name)
            if module in blocks or not inside:
                self._hook_backward(module, name)

    def _hook_forward(self, module: nn.Module, name: str) -> None:
        def enter(*_: Any) -> None:
            self._stack.append((module, name))

        def leave(*_: Any) -> None:
            while self._stack and self._stack.pop()[0] is not module:
                pass  # modules that recomputation stopped early never leave

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _hook_backward(self, module: nn.Module, name: str) -> None:
        """Enter a module when a gradient reaches its output."""

        def arrived(gradient: Tensor) -> None:
            self._stack[:] = [(module, name)]

        def hook_output(_: Any, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            is_recomputed = torch._C._current_graph_task_id() != -1
            if torch.is_tensor(first) and first.requires_grad and not is_recomputed:
                first.register_hook(arrived)

        module.register_forward_hook(hook_output)


@dataclass
class StepSimulator:
    """Runs an engine's steps and records their memory in the ledger.

    Attributes:
        micro_batches: micro-batches of the measured step.
        report_phase: called at the end of each phase.
    """

    engine: Engine
    stage: Stage
    ledger: MemoryLedger
    tracker: ModuleTracker
    mode: FakeTensorMode
    micro_batches: int
    report_phase: Callable[[], None]

    def run(self) -> None:
        """Run a warm-up step, then the step whose peaks the ledger keeps."""
        self.engine.model.train()
        # After its first all-reduce DDP rebuilds its buckets, which reads values.
        self.step([not isinstance(self.engine.model, DistributedDataParallel)])
        self.ledger.forget_peaks()
        self.step([index == self.micro_batches - 1 for index in range(self.micro_batches)])

    def step(self, lasts: list[bool]) -> None:
        """Run an optimizer step; `lasts` says of each micro-batch whether its gradient is sent."""
        with self.mode, self.ledger:
            for index, last in enumerate(lasts):
                self.micro_batch(index, last)
            self.phase("update", lambda: self.engine.step(1e-4))

    def micro_batch(self, index: int, last: bool) -> None:
        """Run the forward and the backward pass of a micro-batch."""
        train, tokens = self.stage.train, self.stage.data.sequence_length
        count = train.micro_batch
        sequence_indices = [index * count + i for i in range(count)]
        set_dropout_key(self.engine.module, 0, 0, sequence_indices, [tokens] * count)
        self.engine.before_forward(last=last)
        batch = build_fake_batch(count, tokens, sequence_indices)
        objective = build_objective(self.stage)
        loss = self.phase("forward", lambda: compute_loss(self.engine, objective, batch).loss)
        self.phase("backward", lambda: self.engine.backward(loss, last=last))

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """Run one phase of a step, and name the tensors that outlive it."""
        self.ledger.phase = name
        result = work()
        gc.collect()  # free what only reference cycles keep alive
        self.ledger.name(self.gradients(), GRADIENTS)
        self.ledger.name(self.states(), OPTIMIZER)
        self.ledger.end_phase()
        self.tracker.reset()
        self.report_phase()
        return result

    def gradients(self) -> list[Tensor]:
        """The gradients that parameters have now."""
        return [p.grad for _, p in self.engine.trainable if p.grad is not None]

    def states(self) -> list[Tensor]:
        """The optimizer's tensors."""
        optimizer: Any = getattr(self.engine, "optimizer", None)
        if optimizer is None:
            return []
        return [
            t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)
        ]


def build_fake_batch(count: int, tokens: int, sequence_indices: list[int]) -> MicroBatch:
    """Build a batch of `count` one-document sequences; every token but the last has a target."""
    whole = count * tokens
    ids = torch.zeros(1, whole, dtype=torch.int64)
    positions = torch.zeros(1, whole, dtype=torch.int64)
    every = torch.zeros(whole - 1, dtype=torch.int64)
    return MicroBatch(
        ids, positions, every, ids[0, 1:], [tokens] * count, sequence_indices, [tokens] * count
    )
