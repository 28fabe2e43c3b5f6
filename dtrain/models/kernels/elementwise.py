"""Llama's element-wise layers: RMSNorm, rotary positions and the inside of a gated MLP.

Each keeps only its inputs for backward and makes fewer passes over memory than transformers' code.
A normalized input, or the product inside an MLP, is as large as what it was computed from, which
autograd saves in any case. So its result records these inputs, and a layer that needs the result in
backward saves them instead and recomputes it: a few passes more, and one large tensor less.

Letters: T tokens, h width, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from dtrain.models.kernels import native
from dtrain.models.kernels.compiled import compile_on_gpu

_ATTRIBUTE = "_dtrain_inputs"

Recompute = Callable[..., Tensor]


def record_inputs(result: Tensor, recompute: Recompute, *inputs: Any) -> None:
    """Record that `result` is `recompute(*inputs)`; autograd must save the inputs anyway."""
    setattr(result, _ATTRIBUTE, (recompute, inputs, result._version))


def recorded_inputs(tensor: Tensor) -> tuple[Recompute, tuple[Any, ...]]:
    """How to recompute a tensor; the tensor itself if nothing is recorded or it was changed."""
    record: tuple[Recompute, tuple[Any, ...], int] | None = getattr(tensor, _ATTRIBUTE, None)
    if record is None or record[2] != tensor._version:
        return _identity, (tensor,)
    return record[:2]


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467) as transformers' Llama computes it.

    Args:
        x: [..., h]; the mean is taken in float32, the result has x's dtype.
        weight: [h].
    """
    result: Tensor
    result, rstd = _RmsNorm.apply(x, weight, epsilon)
    if result.requires_grad and not weight.requires_grad:
        record_inputs(result, _normalized, x, rstd, weight)
    return result


def norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """The forward of a norm like Llama's."""
    epsilon: Any = module.variance_epsilon
    weight: Any = module.weight
    return rms_norm(hidden_states, weight, epsilon)


def _norm_and_rstd(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / root mean square [..., 1] in float32."""
    if native.supports_contiguous(x, weight):
        result, rstd = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
        width = x.shape[-1]
        native.call("rms_norm", x, weight, result, rstd, rstd.numel(), width, epsilon)
        return result, rstd
    return _norm_and_rstd_by_torch(x, weight, epsilon)


@compile_on_gpu
def _norm_and_rstd_by_torch(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return _scaled(x, rstd, weight), rstd


def _scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return (x * rstd).mul_(weight)
    return (x.float() * rstd).to(x.dtype) * weight


_normalized = compile_on_gpu(_scaled)


class _RmsNorm(torch.autograd.Function):
    """y = w x r with r = 1 / rms(x); dx = r (w dy) - x r³ mean(x w dy)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        result, rstd = _norm_and_rstd(x, weight, epsilon)
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
        if native.supports_contiguous(gradient, x, weight):
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


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary positions (arXiv:2104.09864); replaces transformers' `apply_rotary_pos_emb`.

    Args:
        q, k: [1, H, T, D].
        cos, sin: [1, T, D]; their two halves along D are equal.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate the halves (a, b) of x to (a cos - sign b sin, b cos + sign a sin)."""
    result = torch.empty_like(x)
    if _rotates_natively(x, cos, sin):
        _, heads, tokens, size = x.shape
        strides = [(t.stride(2), t.stride(1)) for t in (x, result)]
        native.call(
            "rotary", x, *strides[0], cos, sin, result, *strides[1], tokens, heads, size, sign
        )
        return result
    a, b = x.chunk(2, dim=-1)
    cos_a, cos_b = cos.chunk(2, dim=-1)
    sin_a, sin_b = sin.chunk(2, dim=-1)
    if sign < 0:  # the transposed rotation: each half takes the other half's sine
        sin_a, sin_b = sin_b, sin_a
    first, second = result.chunk(2, dim=-1)
    torch.mul(a, cos_a, out=first).addcmul_(b, sin_a, value=-sign)
    torch.mul(b, cos_b, out=second).addcmul_(a, sin_b, value=sign)
    return result


def _rotates_natively(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    one_sequence = x.shape[0] == 1 and cos.shape == sin.shape == (1, 1, *x.shape[2:])
    dense = native.supports(x) and x.stride(-1) == 1
    return one_sequence and dense and native.supports_contiguous(cos, sin)


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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202)."""
    result: Tensor = _SwiGlu.apply(gate, up)
    if result.requires_grad:
        record_inputs(result, _product, gate, up)
    return result


def mlp_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The forward of an MLP like Llama's."""
    inner: Any = module
    result: Tensor = inner.down_proj(swiglu(inner.gate_proj(x), inner.up_proj(x)))
    return result


def _product(gate: Tensor, up: Tensor) -> Tensor:
    if not native.supports_contiguous(gate, up):
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
        if native.supports_contiguous(gradient, gate, up):
            both = torch.empty_like(gate), torch.empty_like(up)
            native.call("swiglu_backward", gradient, gate, up, *both, gate.numel())
            return both
        return _product_gradients_by_torch(gradient, gate, up)


@compile_on_gpu
def _product_gradients_by_torch(
    gradient: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    dgate = torch.ops.aten.silu_backward(gradient * up, gate)
    return dgate, silu(gate).mul_(gradient)
