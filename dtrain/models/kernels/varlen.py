"""Torch's flash attention over all documents of a sequence, also with sinks (gpt-oss).

A sink is a score s of a head, which takes probability and adds nothing. For a query with scores x
and values v:

    o = Σ_j p_j v_j,   p_j = exp(x_j - L),   L = log(exp(s) + Σ_j exp(x_j))

Flash attention knows of none: it returns o' and L' of the softmax without it. So
L = log(exp(s) + exp(L')), and o = o' exp(L' - L). Its backward pass (arXiv:2307.08691) computes p
from the L, and Σ_j p_j dp_j from the o, that it is given: with those of the sink its gradients are
exact, and no matrix of all scores is made. ds = -Σ exp(s - L) (do · o), over the queries.

Letters: T tokens of a sequence, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from dtrain.core.log import warn

# GPUs (compute capability) and head sizes that FlashAttention-2 supports, in torch and flash-attn.
CAPABILITY, MAX_HEAD_SIZE = (8, 0), 256
BACKWARD_ARGUMENTS = (
    "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale "
    "window_size"
)  # of torch 2.13


def supports_varlen(query: Tensor, value: Tensor, *, has_sinks: bool = False) -> bool:
    """Whether torch documents that its varlen flash attention supports such tensors.

    Args:
        query: […, D].
        value: […, D], or smaller, as with latent attention (MLA).
    """
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and size >= value.shape[-1]
        and size % 8 == 0
        and size <= MAX_HEAD_SIZE
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= CAPABILITY
        and load_torch_varlen() is not None
        and (not has_sinks or load_varlen_backward() is not None)
    )


@cache
def load_torch_varlen() -> Callable[..., Any] | None:
    """torch's varlen attention; None, after one warning, if this version lacks its arguments.

    Imported on first use, as it imports GPU libraries.
    """
    try:
        function: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
        if {"scale", "window_size"} <= signature(function).parameters.keys():
            return function
    except (ImportError, AttributeError):
        pass
    warn("attention: torch's varlen_attn has no scale or window here; documents run one by one")
    return None


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    longest: int,
    window: int | None,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """All documents of a sequence in one call of torch's flash attention.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D]; the head size of values may be smaller.
        boundaries: start of each document, and the end of the last: int32 [documents + 1].
        longest: tokens of the longest document.
        window: how many tokens a token sees, itself included; None: all before it.
        sinks: [H].

    Returns:
        [1, T, H, D].
    """
    attend = load_torch_varlen()
    assert attend is not None, "call supports_varlen first"
    size = value.shape[-1]
    value = pad(value, (0, query.shape[-1] - size))
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    more: dict[str, Any] = {"scale": scale}
    more["window_size"] = (-1 if window is None else window - 1, 0)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        if "enable_gqa" in signature(attend).parameters:
            more["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in (k, v))
    documents = (boundaries, boundaries, longest, longest)
    if sinks is None:
        output: Tensor = attend(q, k, v, *documents, **more)
    else:
        output = _Sinks.apply(q, k, v, sinks, partial(attend, **more), documents)
    return output[..., :size].unsqueeze(0)


@cache
def load_varlen_backward() -> Callable[..., Any] | None:
    """The backward pass of torch's varlen attention; None if this version's takes other arguments.

    Imported on first use, as it imports GPU libraries.
    """
    try:
        import_module("torch.nn.attention.varlen").AuxRequest(lse=True)
        function = torch.ops.torch_attn._varlen_attn_backward.default
    except (ImportError, AttributeError, TypeError):
        return None
    names = " ".join(argument.name for argument in function._schema.arguments)
    return function if names == BACKWARD_ARGUMENTS else None


class _Sinks(torch.autograd.Function):
    """[T, H, D] of such queries, keys and values [T, K, D], and sinks [H]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        attend: partial[Any],
        documents: tuple[Any, ...],
    ) -> Tensor:
        request = import_module("torch.nn.attention.varlen").AuxRequest(lse=True)
        out, logsums = attend(query, key, value, *documents, return_aux=request)  # and [H, T]
        total = torch.logaddexp(logsums, sinks.float().unsqueeze(1))
        out = (out * (logsums - total).exp().t().unsqueeze(2)).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.documents = documents
        ctx.scale, ctx.window = attend.keywords["scale"], attend.keywords["window_size"]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        compute = load_varlen_backward()
        assert compute is not None, "call supports_varlen first"
        gradient, is_causal = gradient.contiguous(), ctx.window == (-1, 0)
        random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of no dropout
        dq, dk, dv = compute(
            gradient, query, key, value, out, total, *ctx.documents, is_causal, random_state,
            ctx.scale, list(ctx.window),
        )  # fmt: skip
        ds = None
        if ctx.needs_input_grad[3]:
            taken = (sinks.float().unsqueeze(1) - total).exp()
            ds = -(taken * (gradient.float() * out.float()).sum(2).t()).sum(1).to(sinks.dtype)
        return dq, dk, dv, ds, None, None
