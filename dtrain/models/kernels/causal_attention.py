"""Causal attention on a CPU, a few queries at a time against the keys that they may see.

torch's flash attention for CPUs reads keys 512 at a time and masks the later ones, so a document
shorter than that costs its whole square. Here it costs half, for all documents of a packed sequence
at once; backward recomputes the attention weights.

Letters: H query heads, K key/value heads, T tokens of a sequence, n of a document, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtrain.models.kernels import native


def supports_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `causal_attention` can compute a sequence [1, H, T, D] of documents."""
    return query.shape[0] == 1 and native.supports(query, key, value)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """Compute softmax(scale q kᵀ) v inside each document, causally.

    Args:
        query: [1, H, T, D].
        key, value: [1, K, T, D]; H is a multiple of K.
        lengths: n of each document; their sum is T.

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
        inputs = [_dense(tensor) for tensor in (query, key, value)]
        _, heads, tokens, _ = query.shape
        result = query.new_empty(1, tokens, heads, value.shape[3])
        logsums = query.new_empty(heads, tokens)
        native.call(
            "attention", _pointers(inputs), result, logsums, *_sizes(inputs, lengths), scale
        )
        ctx.save_for_backward(*inputs, result, logsums)
        ctx.lengths, ctx.scale = lengths, scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, logsums = ctx.saved_tensors
        query, *shared = inputs
        # each key and value head serves several query heads, whose gradients add up
        gradients = [_by_tokens(query, torch.empty), *(_by_tokens(t, torch.zeros) for t in shared)]
        native.call(
            "attention_backward", _pointers(inputs), gradient.contiguous(), out, logsums,
            _pointers(gradients), *_sizes(inputs, ctx.lengths), ctx.scale,
        )  # fmt: skip
        return *(tensor.transpose(1, 2) for tensor in gradients), None, None


def _by_tokens(tensor: Tensor, make: Callable[..., Tensor]) -> Tensor:
    """A new [1, T, H, D] for a [1, H, T, D]."""
    return make(1, tensor.shape[2], tensor.shape[1], tensor.shape[3])


def _dense(tensor: Tensor) -> Tensor:
    """Make the last dimension dense, as the loops expect."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pointers(tensors: list[Tensor]) -> Tensor:
    """The tensors' addresses, as an int64 array."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def _sizes(inputs: list[Tensor], lengths: tuple[int, ...]) -> tuple[Tensor | int, ...]:
    query, key, value = inputs
    strides = torch.tensor([t.stride(axis) for t in inputs for axis in (2, 1)])
    _, heads, tokens, size = query.shape
    counts = torch.tensor(lengths)
    return strides, counts, len(lengths), tokens, heads, key.shape[1], size, value.shape[3]
