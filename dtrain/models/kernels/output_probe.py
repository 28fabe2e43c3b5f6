"""Finds out how a model computes logits around its output layer, by running its own forward.

The model's children are replaced by stubs, so the probe needs no weights, works on the meta device
and takes milliseconds. Letters: T tokens, h width, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.models.kernels.same_program import runs_its_class

TOKENS, KEPT = 5, (1, 3)
LogitTransform = Callable[[Tensor], Tensor]  # [c, V] → [c, V]


class OutputProbe:
    """A model's own forward between its hidden states and its logits.

    Attributes:
        exact: whether the logits follow from the output layer's output for the kept tokens alone.
        transform: what the model applies to that output token by token, such as a scale or a soft
            cap; None if nothing.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear) -> None:
        self._width, self._vocabulary = head.in_features, head.out_features
        self._states, self._head = _States(), _Head(head)
        self._model = _with_stubs(model, head, self._states, self._head)
        self.transform: LogitTransform | None = None
        self.exact = _stub_fits(model, head) and self._is_exact()

    def _is_exact(self) -> bool:
        try:
            with torch.device("cpu"):  # the caller may build on the meta device
                return all(self._follows_from_kept_tokens(training) for training in (False, True))
        except Exception:  # a model that needs more than hidden states may raise anything
            return False

    def _follows_from_kept_tokens(self, training: bool) -> bool:
        self._model.training = training
        rows = torch.arange(1, TOKENS + 1.0).expand(self._width, TOKENS).t()
        raw = _numbers(len(KEPT), self._vocabulary)
        before = raw.clone()
        kept = torch.tensor(KEPT)
        with torch.set_grad_enabled(training):
            logits = self._run(rows, raw, logits_to_keep=kept)
        calls = self._head.inputs
        gets_kept_rows = len(calls) == 1 and torch.equal(calls[0][0], rows[kept])
        if not gets_kept_rows or not torch.equal(raw, before):
            return False
        if logits is self._head.output:
            return True
        self.transform = self._transformed
        return self._is_by_row(logits[0], raw)

    def _is_by_row(self, logits: Tensor, raw: Tensor) -> bool:
        """Whether each token's logits follow from the output layer's row for that token alone."""
        first = raw[:1].clone().requires_grad_()
        alone = self._transformed(first)
        with torch.no_grad():
            alone.detach().mul_(2.0)  # the loss overwrites them: backward must not need them
        (gradient,) = torch.autograd.grad(alone, first, torch.ones_like(alone))
        again = self._transformed(raw[:1])
        return (
            logits.shape == raw.shape
            and logits.dtype == raw.dtype
            and torch.equal(again, logits[:1])
            and bool(gradient.isfinite().all())
        )

    def _transformed(self, raw: Tensor) -> Tensor:
        """The model's logits for the output [c, V] of its output layer."""
        states = torch.zeros(len(raw), self._width, device=raw.device)
        return self._run(states, raw)[0]

    def _run(self, states: Tensor, raw: Tensor, **more: Tensor) -> Tensor:
        self._states.states, self._head.logits = states.unsqueeze(0), raw.unsqueeze(0)
        self._head.inputs.clear()
        positions = torch.arange(len(states), device=states.device).unsqueeze(0)
        output = type(self._model).forward(
            self._model, input_ids=positions, position_ids=positions, use_cache=False, **more
        )
        logits: Tensor = output.logits
        return logits


def _stub_fits(model: PreTrainedModel, head: nn.Linear) -> bool:
    return (
        runs_its_class(model)
        and runs_its_class(head)
        and "logits_to_keep" in signature(type(model).forward).parameters
        and sum(child is head for child in model._modules.values()) == 1
    )


def _with_stubs(model: PreTrainedModel, head: nn.Linear, states: nn.Module, stub: nn.Module) -> Any:
    """A copy of the model without weights; a forward that reads its own parameters fails."""
    result = copy(model)
    result._parameters, result._buffers = {}, {}
    result._modules = {n: stub if m is head else states for n, m in model._modules.items()}
    return result


def _numbers(rows: int, width: int) -> Tensor:
    """Distinct small numbers of both signs."""
    return torch.linspace(-3.0, 3.0, rows * width).view(rows, width)


class _Output:
    """A decoder's output that has hidden states and nothing else."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _States(nn.Module):
    """A stub of the model's layers that returns hidden states [1, T, h] for any access."""

    states: Tensor

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.states)


class _Head(nn.Module):
    """A stub of the output layer that records its inputs and returns logits [1, c, V]."""

    logits: Tensor

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=head.weight.dtype)
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.inputs.append(hidden)
        self.output = self.logits
        return self.logits
