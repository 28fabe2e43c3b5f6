"""Causal attention on a CPU, some queries at a time against the keys that they may see.

torch's flash attention for CPUs takes keys 512 at a time and masks what lies ahead: a document
shorter than that costs its whole square. Here it costs half, and backward makes the weights anew.

Letters: H query heads, K key/value heads, G = H / K, n tokens, D head size, b queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64
FASTER = range(192, 769)  # tokens; measured against flash attention, both directions together


def is_faster(query: Tensor) -> bool:
    """Whether `causal_attention` is the better way for queries [1, H, n, D]."""
    fits = query.device.type == "cpu" and query.dtype == torch.float32
    return fits and query.shape[2] in FASTER and not torch.is_autocast_enabled("cpu")


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q kᵀ) v, each token seeing itself and those before it.

    Args:
        query: [1, H, n, D].
        key, value: [1, K, n, D]; H is a multiple of K.

    Returns:
        [1, H, n, D].
    """
    result: Tensor = _Causal.apply(query, key, value, scale)
    return result


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        grouped, keys, values = _grouped(query * scale, key), key[0], value[0]
        out = query.new_empty(query.shape[2], *grouped.shape[:2], value.shape[3])  # [n, K, G, D]
        for start, stop in _blocks(query):
            weights = _weights(_flat(grouped, start, stop), keys, start, stop)
            block = torch.bmm(weights, values[:, :stop])
            out[start:stop] = block.unflatten(1, (-1, stop - start)).permute(2, 0, 1, 3)
        return out.flatten(1, 2).transpose(0, 1).unsqueeze(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        grouped, keys, values = _grouped(query * ctx.scale, key), key[0], value[0]
        outer = _grouped(gradient, key)
        dq, dk, dv = torch.empty_like(grouped), torch.zeros_like(keys), torch.zeros_like(values)
        for start, stop in _blocks(query):
            queries, dout = _flat(grouped, start, stop), _flat(outer, start, stop)
            weights = _weights(queries, keys, start, stop)
            dv[:, :stop].baddbmm_(weights.transpose(1, 2), dout)
            dweights = torch.bmm(dout, values[:, :stop].transpose(1, 2))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq[:, :, start:stop] = torch.bmm(dscores, keys[:, :stop]).unflatten(
                1, (-1, stop - start)
            )
            dk[:, :stop].baddbmm_(dscores.transpose(1, 2), queries)
        return dq.mul_(ctx.scale).view(query.shape), dk[None], dv[None], None


def _blocks(query: Tensor) -> Iterator[tuple[int, int]]:
    """Where blocks of queries start and stop."""
    tokens = query.shape[2]
    for start in range(0, tokens, BLOCK):
        yield start, min(start + BLOCK, tokens)


def _grouped(heads: Tensor, key: Tensor) -> Tensor:
    """[1, H, n, D] as [K, G, n, D]."""
    return heads[0].unflatten(0, (key.shape[1], -1)).contiguous()


def _flat(grouped: Tensor, start: int, stop: int) -> Tensor:
    """A block of [K, G, n, D] as [K, G b, D]."""
    return grouped[:, :, start:stop].flatten(1, 2)


def _weights(queries: Tensor, keys: Tensor, start: int, stop: int) -> Tensor:
    """What queries [K, G b, D], scaled, take of each key they may see: [K, G b, stop]."""
    scores = torch.bmm(queries, keys[:, :stop].transpose(1, 2))
    width = stop - start
    scores.unflatten(1, (-1, width))[..., start:].add_(_ahead()[:width, :width])
    return torch.softmax(scores, -1)


@cache
def _ahead() -> Tensor:
    """Minus infinity above the diagonal [BLOCK, BLOCK]."""
    return torch.full((BLOCK, BLOCK), float("-inf")).triu(1)
