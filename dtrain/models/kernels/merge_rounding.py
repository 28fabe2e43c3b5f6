"""The two passes of a merge over a block of weights: add the update, round to the stored dtype.

Each loop passes once over memory that is in the core's cache, where torch makes three passes; the
results are equal bit by bit. Several threads call them at once, each on one core.
"""

from __future__ import annotations

from ctypes import CDLL
from functools import cache
from threading import Lock

import torch
from torch import Tensor

from dtrain.distributed.tensor_utils import all_finite
from dtrain.models.kernels import native

LOOPS = {torch.bfloat16: "add_scaled", torch.float32: "add_scaled_wide"}
_build_lock = Lock()


def add_scaled(old: Tensor, added: Tensor, factor: float) -> Tensor:
    """Compute `old` + `factor` · `added`, rounding each operation to float32.

    Args:
        old: any float dtype, contiguous.
        added: float32, of the same shape, contiguous; it is overwritten and returned.
    """
    if (loops := _loops()) is None or old.dtype not in LOOPS:
        return added.mul_(factor).add_(old.float())
    native.call_in(loops, LOOPS[old.dtype], old, added, added.numel(), factor)
    return added


def round_into(value: Tensor, rounded: Tensor) -> bool:
    """Round `value` into `rounded`, a contiguous tensor of the same size.

    Returns:
        Whether every rounded element is finite.
    """
    loops = _loops()
    if loops is None or (value.dtype, rounded.dtype) != (torch.float32, torch.bfloat16):
        rounded.copy_(value)
        return all_finite(rounded)
    non_finite = torch.zeros(1, dtype=torch.int32)
    native.call_in(loops, "round_bfloat16", value, rounded, non_finite, value.numel())
    return not non_finite.item()


def _loops() -> CDLL | None:
    with _build_lock:
        return _load()


@cache
def _load() -> CDLL | None:
    return native.load_loops()[0]
