"""RMSNorm (arXiv:1910.07467) in four passes forward and five backward, keeping its input alone.

Letters: T tokens, h their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.models.kernels.recompute import made_by


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each token over its root mean square, times weight [h], as transformers' Llama computes it.

    Args:
        x: [..., h]; the mean is taken in float32, the result has x's dtype.
    """
    rstd = _reciprocal(x, epsilon)
    result: Tensor = _RmsNorm.apply(x, weight, rstd)
    if result.requires_grad and not weight.requires_grad:
        made_by(result, _normalised, x, rstd, weight)
    return result


def norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """In place of the forward of a norm like Llama's."""
    epsilon: Any = module.variance_epsilon
    weight: Any = module.weight
    return rms_norm(hidden_states, weight, epsilon)


def _reciprocal(x: Tensor, epsilon: float) -> Tensor:
    """1 / root mean square [..., 1] in float32."""
    with torch.no_grad():
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _normalised(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return (x * rstd).mul_(weight)
    return (x.float() * rstd).to(x.dtype) * weight


class _RmsNorm(torch.autograd.Function):
    """y = w x r with r = 1 / rms(x); dx = r (w dy) - x r³ mean(x w dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, rstd)
        return _normalised(x, rstd, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        wide = x.float()
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (gradient * (wide * rstd)).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        scaled = (gradient * weight).float()
        mean = torch.linalg.vecdot(scaled, wide).unsqueeze(-1).div_(x.shape[-1])
        factor = mean.mul_(rstd).mul_(rstd).mul_(rstd)
        dx = scaled.mul_(rstd).addcmul_(wide, factor, value=-1)
        return dx.to(x.dtype), dw, None
