"""What every engine hands over: one contiguous range of each flattened parameter.

DDP, FSDP2 (shards of dimension 0), ZeRO-2 and ZeRO-3 (flat partitions) all hold such ranges, so a
checkpoint made of ranges belongs to none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NEUTRAL_KINDS = frozenset({"weight", "exp_avg", "exp_avg_sq"})
"""Kinds with one float32 number an element: these can be cut anew for other ranks and engines."""


@dataclass(frozen=True)
class ParameterShard:
    """Elements [start, stop) of one flattened (row-major) parameter, with what belongs to them.

    A rank that owns nothing of a parameter says so with start == stop: what is missing from a
    model can be told from what lies on another rank only if every rank names every parameter.

    Args:
        name: the parameter's name in the model.
        shape: its global shape.
        start: first element of this rank's range.
        stop: the element after the last.
        tensors: kind → 1-D tensor. The neutral kinds (weight, exp_avg, exp_avg_sq) are float32
            [stop - start]. Any other kind is opaque: any dtype, any length (an 8-bit optimizer's
            quantised state), and can be restored only into the same range. Its name must not be
            that of a neutral kind.

    Raises:
        ValueError: the range or a tensor does not fit, which is a defect of the engine.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= elements(self.shape):
            raise ValueError(f"{self.name}: [{self.start}, {self.stop}) is not in {self.shape}")
        for kind, tensor in self.tensors.items():
            if tensor.dim() != 1:
                raise ValueError(f"{self.name} {kind}: 1-D expected, got {tuple(tensor.shape)}")
            if kind in NEUTRAL_KINDS:
                self._check_neutral(kind, tensor)

    def _check_neutral(self, kind: str, tensor: Tensor) -> None:
        length = self.stop - self.start
        if tensor.dtype != torch.float32 or tensor.numel() != length:
            raise ValueError(
                f"{self.name} {kind}: float32 [{length}] expected, "
                f"got {tensor.dtype} [{tensor.numel()}]"
            )


def share_of(
    pieces: Iterable[ParameterShard], number: int, copies: int
) -> Iterator[ParameterShard]:
    """What one of several ranks that hold the same pieces saves: about an equal part, whole pieces.

    The others' come out empty. All copies see the same pieces in the same order, so they agree.
    """
    loads = [0] * copies
    for piece in pieces:
        least = loads.index(min(loads))
        loads[least] += piece.stop - piece.start
        yield piece if least == number else replace(piece, stop=piece.start, tensors={})


def elements(shape: tuple[int, ...] | list[int]) -> int:
    """Number of elements of a tensor of this shape."""
    return math.prod(shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    aminmax lets NaN through and needs no second tensor: an eighth of isfinite().all()'s time.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))
