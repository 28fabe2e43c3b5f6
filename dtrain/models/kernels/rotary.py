"""Rotary positions (arXiv:2104.09864) in two passes, without the halves put together anew.

Letters: H heads, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtrain.models.kernels import native


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """In place of transformers' `apply_rotary_pos_emb`.

    Args:
        q, k: [1, H, T, D].
        cos, sin: [1, T, D], whose halves along D are alike.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """The halves (a, b) of x as (a cos - sign b sin, b cos + sign a sin)."""
    result = torch.empty_like(x)
    if _fits(x, cos, sin):
        _, heads, tokens, size = x.shape
        strides = [(t.stride(2), t.stride(1)) for t in (x, result)]
        native.call(
            "rotary", x, *strides[0], cos, sin, result, *strides[1], tokens, heads, size, sign
        )
        return result
    a, b = x.chunk(2, dim=-1)
    cos_a, cos_b = cos.chunk(2, dim=-1)
    sin_a, sin_b = sin.chunk(2, dim=-1)
    if sign < 0:  # the transposed rotation: each half takes the sine that the other had
        sin_a, sin_b = sin_b, sin_a
    first, second = result.chunk(2, dim=-1)
    torch.mul(a, cos_a, out=first).addcmul_(b, sin_a, value=-sign)
    torch.mul(b, cos_b, out=second).addcmul_(a, sin_b, value=sign)
    return result


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    one_row = x.shape[0] == 1 and cos.shape == sin.shape == (1, 1, *x.shape[2:])
    return one_row and native.fits(x) and x.stride(-1) == 1 and native.fits_flat(cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1.0), None, None
