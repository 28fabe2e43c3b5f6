"""What the routers of a mixture of experts choose: the load of each expert, and its balance.

The load-balancing loss of transformers (arXiv:2101.03961, its equations 4 to 6) is

    E Σ_e f_e P_e,   f_e = choices of e / N,   P_e = Σ probabilities of e / N,

with sums over the tokens of all layers, and N their number. f has no gradient, and P is a sum over
tokens: with the f and N of a global batch, every micro-batch has an exact share of the loss.

Letters: T tokens of a micro-batch, k experts of a token, E experts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral import modeling_mixtral as mixtral

from dtrain.models.expert_layers import (
    count_choices,
    is_batched,
    is_experts,
    recorded_routers,
)
from dtrain.models.kernels.same_program import same_program
from dtrain.models.loss import transformers_model

LOSS = "load_balancing_loss_func"  # of transformers, in the module of each model that has it
CHOICES = ((1, "top_k_index"), (2, "top_k_weights"))  # arguments of experts, [T, k]
NO_EXPERT = -1  # counts nowhere: of a token that a router lets pass
LAYER = re.compile(r"\w+\.\d+(?=\.)")  # the first part of a name that is numbered

RouterSums = list[tuple[Tensor, Tensor]]
"""Choices [E] and sums of probabilities [E] of each call of a router."""


class LoadBalance:
    """The load-balancing loss of a model, by the model's own coefficient.

    Args:
        model: not wrapped by an engine.

    Attributes:
        obstacle: why the model has no such loss; empty if it has one.
        coefficient: of the model's config.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = transformers_model(model)
        self.coefficient = float(_setting(inner, "router_aux_loss_coef"))
        self._choices = int(_setting(inner, "num_experts_per_tok"))
        self._sums: RouterSums | None = None
        self._with_gradient = False
        self._index, routers = recorded_routers(model)
        own_loss = getattr(sys.modules[type(inner).__module__], LOSS, None)
        self.obstacle = ""
        if not same_program(own_loss, mixtral.load_balancing_loss_func):
            self.obstacle = "transformers has none for it"
        elif not self.coefficient:
            self.obstacle = "its coefficient, router_aux_loss_coef in config.json, is 0"
        elif not (routers and self._choices):
            self.obstacle = "its routers do not return what it is computed from"
        else:
            for router in routers:
                router.register_forward_hook(self._see)

    @contextmanager
    def recording(self) -> Iterator[RouterSums]:
        """Collect the sums of the forward passes inside.

        Only of those that have a gradient if gradients are enabled here: a reference has none.
        """
        self._sums, self._with_gradient = [], torch.is_grad_enabled()
        try:
            yield self._sums
        finally:
            self._sums = None  # layers that are recomputed are not collected again

    def loss(self, all_choices: Tensor, probabilities: Tensor) -> Tensor:
        """The share of some tokens in the loss of a global batch, times the coefficient.

        Args:
            all_choices: [E], sum over the global batch.
            probabilities: [E], sum over these tokens.
        """
        tokens = all_choices.sum() / self._choices
        factors = self.coefficient * len(all_choices) * all_choices / tokens**2
        return (factors.to(probabilities) * probabilities).sum()

    def _see(self, router: nn.Module, _: Any, output: Any) -> None:
        if self._sums is None and not torch.is_grad_enabled():
            return
        # A layer that is recomputed must save the same tensors as in its first pass.
        logits = output if isinstance(output, Tensor) else output[self._index]
        probabilities = torch.softmax(logits.flatten(0, -2), dim=-1)
        chosen = probabilities.detach().topk(self._choices, dim=-1).indices
        choices, summed = count_choices(chosen, logits.shape[-1]), probabilities.float().sum(0)
        if self._sums is not None and torch.is_grad_enabled() == self._with_gradient:
            self._sums.append((choices, summed))


def _setting(model: Any, name: str) -> float:
    """A number that a model keeps for its loss, or has in its config; 0 without it."""
    return getattr(model, name, None) or getattr(model.config.get_text_config(), name, None) or 0


class ExpertLoad:
    """The tokens of each expert in a step, counted on the device.

    Args:
        model: not wrapped by an engine.
    """

    def __init__(self, model: nn.Module) -> None:
        experts: dict[str, Any] = {n: m for n, m in model.named_modules() if is_experts(m)}
        self._sizes = [int(module.num_experts) for module in experts.values()]
        self._labels = _labels(list(experts))
        self._counts: list[Tensor | None] = [None] * len(experts)
        self._records = False
        for index, module in enumerate(experts.values()):
            module.register_forward_pre_hook(self._counter(index), with_kwargs=True)

    @contextmanager
    def recording(self, *, is_empty: bool = False) -> Iterator[None]:
        """Count in the forward passes inside that have a gradient.

        Args:
            is_empty: the tokens only fill the micro-batch of a rank without sequences.
        """
        self._records = not is_empty
        try:
            yield
        finally:
            self._records = False

    def take(self) -> list[float]:
        """The counts since the last call, of all experts of all layers; waits for the device."""
        called = [count.double() for count in self._counts if count is not None]
        values = iter(torch.cat(called).tolist() if called else ())
        counts: list[float] = []
        for count, size in zip(self._counts, self._sizes, strict=True):
            counts += [0.0] * size if count is None else islice(values, size)
        self._counts = [None] * len(self._counts)
        return counts

    def metrics(self, counts: Sequence[float]) -> dict[str, dict[str, float]]:
        """What is logged of each layer with experts.

        Args:
            counts: as from `take`, of the global batch.

        Returns:
            By layer: `max_load`, the tokens of the expert with most, as a multiple of an even
            share; `unused`, how many experts got none.
        """
        metrics, start = {}, 0
        for label, size in zip(self._labels, self._sizes, strict=True):
            layer = counts[start : start + size]
            start += size
            if not any(layer):  # of experts for images, to which no text goes
                continue
            load = max(layer) * size / sum(layer)
            metrics[label] = {"max_load": round(load, 4), "unused": layer.count(0.0)}
        return metrics

    def _counter(self, index: int) -> Callable[..., None]:
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not (self._records and torch.is_grad_enabled()):
                return
            size, before = self._sizes[index], self._counts[index]
            if is_batched(module):  # rows of zeros belong to other experts
                counts = (args[0] != 0).any(-1).view(size, -1).sum(1)
            else:
                chosen, weights = (kwargs.get(k, *args[n : n + 1]) for n, k in CHOICES)
                counts = count_choices(chosen.masked_fill(weights == 0, NO_EXPERT), size)
            self._counts[index] = counts if before is None else before + counts

        return count


def _labels(names: list[str]) -> list[str]:
    """Short names of layers, such as layers.3."""
    found = [LAYER.search(name) for name in names]
    labels = [match.group() for match in found if match]
    return labels if len(set(labels)) == len(names) else names
