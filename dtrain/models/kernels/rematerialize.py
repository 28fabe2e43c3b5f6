"""Tensors that backward recomputes from inputs that autograd saves anyway.

A normalized input, or the product inside an MLP, is as large as what it was computed from, which
autograd saves in any case. A layer that needs such a tensor in backward saves these inputs instead
and recomputes it: a few element-wise passes, and one large tensor less in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

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
