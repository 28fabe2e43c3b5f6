"""The two passes over a block of a merge: add to the stored values, round to their dtype.

Each goes once through memory that is still in a core's cache, where torch would make three passes;
the values are the same, to the bit. Called by several threads at once, each with one core.
"""

from __future__ import annotations

from ctypes import CDLL
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from dtrain.models.kernels import native
from dtrain.models.tensor_utils import all_finite

LOOPS = {torch.bfloat16: "add_scaled", torch.float32: "add_scaled_wide"}
_one_builds = Lock()


def add_scaled(old: Tensor, added: Tensor, factor: float) -> Tensor:
    """`old` + `factor` · `added`, each operation rounded to float32.

    Args:
        old: any float, contiguous.
        added: float32, of the same shape, contiguous; overwritten, and returned.
    """
    if (loops := _loops()) is None or old.dtype not in LOOPS:
        return added.mul_(factor).add_(old.float())
    native.call_of(loops, LOOPS[old.dtype], old, added, added.numel(), factor)
    return added


def round_into(value: Tensor, rounded: Tensor) -> bool:
    """Round `value` to the dtype of `rounded`, of the same size, contiguous both.

    Returns:
        Whether every element is finite afterwards.
    """
    loops = _loops()
    if loops is None or (value.dtype, rounded.dtype) != (torch.float32, torch.bfloat16):
        rounded.copy_(value)
        return all_finite(rounded)
    odd = torch.zeros(1, dtype=torch.int32)
    native.call_of(loops, "round_bfloat16", value, rounded, odd, value.numel())
    return not odd.item()


def _loops() -> CDLL | None:
    with _one_builds:
        return _found()


@cache
def _found() -> CDLL | None:
    return native.find()[0]
