"""Tensors that are kept for backward as what they were made from.

A normalised input, or the product inside an MLP, is as large as what it was made from, which
autograd keeps anyway. A layer that needs such an input again keeps its parts and makes it anew:
a few element-wise passes for a whole tensor less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_MARK = "_dtrain_parts"

Make = Callable[..., Tensor]


def made_by(result: Tensor, make: Make, *parts: Any) -> None:
    """Note on `result` that it is `make(*parts)`; parts are tensors that autograd keeps anyway."""
    setattr(result, _MARK, (make, parts, result._version))


def parts_of(tensor: Tensor) -> tuple[Make, tuple[Any, ...]]:
    """What `tensor` is made from; the tensor itself, where nothing is known or it was changed."""
    known: tuple[Make, tuple[Any, ...], int] | None = getattr(tensor, _MARK, None)
    if known is None or known[2] != tensor._version:
        return _itself, (tensor,)
    return known[:2]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
