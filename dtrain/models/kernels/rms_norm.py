"""RMSNorm (arXiv:1910.07467) in four passes forward and five backward, keeping its input alone.

Letters: T tokens, h their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.models.kernels import native
from dtrain.models.kernels.compiled import compile_on_gpu
from dtrain.models.kernels.rematerialize import made_by


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each token over its root mean square, times weight [h], as transformers' Llama computes it.

    Args:
        x: [..., h]; the mean is taken in float32, the result has x's dtype.
    """
    result: Tensor
    result, rstd = _RmsNorm.apply(x, weight, epsilon)
    if result.requires_grad and not weight.requires_grad:
        made_by(result, _normalised, x, rstd, weight)
    return result


def norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """In place of the forward of a norm like Llama's."""
    epsilon: Any = module.variance_epsilon
    weight: Any = module.weight
    return rms_norm(hidden_states, weight, epsilon)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / root mean square [..., 1] in float32."""
    if native.fits_flat(x, weight):
        result, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
        width = x.shape[-1]
        native.call("rms_norm", x, weight, result, rstd, rstd.numel(), width, epsilon)
        return result, rstd
    return _normed_by_torch(x, weight, epsilon)


@compile_on_gpu
def _normed_by_torch(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return _scaled(x, rstd, weight), rstd


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return (x * rstd).mul_(weight)
    return (x.float() * rstd).to(x.dtype) * weight


_normalised = compile_on_gpu(_scaled)


class _RmsNorm(torch.autograd.Function):
    """y = w x r with r = 1 / rms(x); dx = r (w dy) - x r³ mean(x w dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        result, rstd = _normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return result, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        dw = _weight_gradient(gradient, x, weight, rstd) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dw, None
        if native.fits_flat(gradient, x, weight):
            dx = torch.empty_like(x)
            native.call(
                "rms_norm_backward", gradient, x, weight, rstd, dx, rstd.numel(), x.shape[-1]
            )
            return dx, dw, None
        return _input_gradient(gradient, x, weight, rstd), dw, None


@compile_on_gpu
def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return (gradient * (x.float() * rstd)).flatten(0, -2).sum(0).to(weight.dtype)


@compile_on_gpu
def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    wide = x.float()
    scaled = (gradient * weight).float()
    mean = torch.linalg.vecdot(scaled, wide).unsqueeze(-1).div_(x.shape[-1])
    factor = mean.mul_(rstd).mul_(rstd).mul_(rstd)
    return scaled.mul_(rstd).addcmul_(wide, factor, value=-1).to(x.dtype)
