"""A LoRA layer whose adapter counts from its first values A₀ and B₀, which come from the base.

    y = x Wᵀ + s drop(x) (B A - B₀ A₀)ᵀ

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) write this as W_res + s B A with the changed
base W_res = W - s B₀ A₀. Here W stays as it is: nothing is rounded at the start, the base is still
there as a reference, and the change merges into it. Dropout acts on the change alone.

Letters: h width of x, o of y, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn.functional import linear


class FirstFactors(nn.Module):
    """A₀ [r, h] and B₀ [o, r] of a layer, frozen: engines shard them like all parameters."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros_like(a, dtype=torch.float32), requires_grad=False)
        self.b = nn.Parameter(torch.zeros_like(b, dtype=torch.float32), requires_grad=False)

    def start_at(self, a: Tensor, b: Tensor) -> None:
        """Count from these values, on their device."""
        self.a = nn.Parameter(a.detach().clone(), requires_grad=False)
        self.b = nn.Parameter(b.detach().clone(), requires_grad=False)


class DifferenceVariant(LoraVariant):
    """The difference in PEFT's forward, for layers without a kernel."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        first: FirstFactors = module.first_factors
        x = module.lora_dropout[active_adapter](x)
        change = b(a(x)) - linear(linear(x, first.a.to(a.weight.dtype)), first.b.to(b.weight.dtype))
        return result + change * module.scaling[active_adapter]


def count_from_start(layer: Any, adapter: str) -> None:
    """Let a LoRA layer's adapter count from values that are zero until they are set."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    layer.first_factors = FirstFactors(a, b)
    layer.lora_variant[adapter] = DifferenceVariant()


def first_factors(layer: Any, adapter: str) -> FirstFactors | None:
    """A layer's first factors; None if its adapter counts from zero."""
    if not isinstance(layer.lora_variant.get(adapter), DifferenceVariant):
        return None
    factors = layer.first_factors
    assert isinstance(factors, FirstFactors)
    return factors
