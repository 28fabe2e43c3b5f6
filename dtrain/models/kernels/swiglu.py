"""The inside of a gated MLP (arXiv:2002.05202), silu(gate) x up, keeping its two inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from dtrain.models.kernels import native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.rematerialize import made_by


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    result: Tensor = _SwiGlu.apply(gate, up)
    if result.requires_grad:
        made_by(result, _product, gate, up)
    return result


def mlp_forward(module: nn.Module, x: Tensor) -> Tensor:
    """In place of the forward of an MLP like Llama's."""
    inner: Any = module
    result: Tensor = inner.down_proj(swiglu(inner.gate_proj(x), inner.up_proj(x)))
    return result


def _product(gate: Tensor, up: Tensor) -> Tensor:
    if not native.fits_flat(gate, up):
        return _product_by_torch(gate, up)
    result = torch.empty_like(gate)
    native.call("swiglu", gate, up, result, gate.numel())
    return result


@compile_on_gpu
def _product_by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate).mul_(up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if native.fits_flat(gradient, gate, up):
            both = torch.empty_like(gate), torch.empty_like(up)
            native.call("swiglu_backward", gradient, gate, up, *both, gate.numel())
            return both
        return _gradients_by_torch(gradient, gate, up)


@compile_on_gpu
def _gradients_by_torch(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.ops.aten.silu_backward(gradient * up, gate)
    return dgate, silu(gate).mul_(gradient)
