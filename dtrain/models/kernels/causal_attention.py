"""Causal attention on a CPU, some queries at a time against the keys that they may see.

torch's flash attention for CPUs takes keys 512 at a time and masks what lies ahead: a document
shorter than that costs its whole square. Here it costs half, all documents of a row at once, and
backward makes the weights anew.

Letters: H query heads, K key/value heads, T tokens of a row, n of a document, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtrain.models.kernels import native


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` can compute a row [1, H, T, D] of documents."""
    return query.shape[0] == 1 and native.fits(query, key, value)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """softmax(scale q kᵀ) v inside each document, each token seeing itself and those before it.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D]; H is a multiple of K.
        lengths: n of each document; T in all.

    Returns:
        [1, T, H, D].
    """
    result: Tensor = _Causal.apply(query, key, value, lengths, scale)
    return result


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        given = [_dense(tensor) for tensor in (query, key, value)]
        _, heads, tokens, _ = query.shape
        result = query.new_empty(1, tokens, heads, value.shape[3])
        logsums = query.new_empty(heads, tokens)
        native.call("attention", _places(given), result, logsums, *_sizes(given, lengths), scale)
        ctx.save_for_backward(*given, result, logsums)
        ctx.lengths, ctx.scale = lengths, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *given, out, logsums = ctx.saved_tensors
        query, *shared = given
        # keys and values meet several heads, whose gradients add up
        found = [_by_tokens(query, torch.empty), *(_by_tokens(t, torch.zeros) for t in shared)]
        native.call(
            "attention_backward", _places(given), gradient.contiguous(), out, logsums,
            _places(found), *_sizes(given, ctx.lengths), ctx.scale,
        )  # fmt: skip
        return *(tensor.transpose(1, 2) for tensor in found), None, None


def _by_tokens(tensor: Tensor, make: Callable[..., Tensor]) -> Tensor:
    """A new [1, T, H, D] for a [1, H, T, D]."""
    return make(1, tensor.shape[2], tensor.shape[1], tensor.shape[3])


def _dense(tensor: Tensor) -> Tensor:
    """With a dense last dimension, as the loops read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _places(tensors: list[Tensor]) -> Tensor:
    """Where tensors lie, as an array of pointers."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def _sizes(given: list[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor | int, ...]:
    query, key, value = given
    strides = torch.tensor([t.stride(axis) for t in given for axis in (2, 1)])
    _, heads, tokens, size = query.shape
    each = torch.tensor(lengths)
    return strides, each, len(lengths), tokens, heads, key.shape[1], size, value.shape[3]
