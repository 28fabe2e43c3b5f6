"""What every engine saves: one contiguous range of each flattened parameter.

DDP, FSDP2 (shards of dimension 0), ZeRO-2 and ZeRO-3 (flat partitions) all hold such ranges, so a
checkpoint made of ranges belongs to none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

WEIGHT = "weight"
WEIGHT_KINDS = (WEIGHT, "training_weight", "z")
"""Kinds that start as the parameter's first value. `weight` is what results are made of; an
optimizer that averages has the weights that train, and schedule-free's z, in addition."""

NEUTRAL_KINDS = frozenset({*WEIGHT_KINDS, "exp_avg", "exp_avg_sq", "sensitivity", "uncertainty"})
"""Kinds with one float32 value per element: they can be resharded for other ranks and engines."""

GRADIENT = "gradient"
"""A kind that exists between a backward pass and the update, and is not saved."""


@dataclass(frozen=True)
class ParameterShard:
    """Elements [start, stop) of one flattened (row-major) parameter, with their state.

    A rank without elements of a parameter has a shard with start == stop. Since every rank lists
    every parameter, one that is missing from the model is not mistaken for one on another rank.

    Attributes:
        name: the parameter's name in the model.
        shape: its global shape.
        start: first element of this rank's range.
        stop: the element after the last.
        tensors: kind → 1-D tensor. The neutral kinds (weight, exp_avg, …) are float32
            [stop - start]. Any other kind is opaque: any dtype, any length (an 8-bit optimizer's
            quantized state), and can be restored only into the same range.

    Raises:
        ValueError: the range or a tensor does not fit, which is a defect of the engine.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensors: dict[str, Tensor]

    @property
    def training_weight(self) -> Tensor:
        """The weights that train, a view, of which `weight` may be an average."""
        tensors = self.tensors
        return tensors.get("training_weight", tensors.get(WEIGHT, torch.empty(0)))

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= elements(self.shape):
            raise ValueError(f"{self.name}: [{self.start}, {self.stop}) is not in {self.shape}")
        length = self.stop - self.start
        for kind, tensor in self.tensors.items():
            if tensor.dim() != 1:
                raise ValueError(f"{self.name} {kind}: 1-D expected, got {tuple(tensor.shape)}")
            is_plain = tensor.dtype == torch.float32 and tensor.numel() == length
            if kind in NEUTRAL_KINDS and not is_plain:
                raise ValueError(
                    f"{self.name} {kind}: float32 [{length}] expected, "
                    f"got {tensor.dtype} [{tensor.numel()}]"
                )


def split_among_replicas(
    shards: Iterable[ParameterShard], replica: int, replicas: int
) -> Iterator[ParameterShard]:
    """Yield what one of several ranks with the same shards saves: whole shards, about equal bytes.

    The shards that other replicas save come out empty. All replicas see the same shards in the same
    order, so they agree.
    """
    loads = [0] * replicas
    for shard in shards:
        least = loads.index(min(loads))
        loads[least] += shard.stop - shard.start
        yield shard if least == replica else replace(shard, stop=shard.start, tensors={})


def elements(shape: tuple[int, ...] | list[int]) -> int:
    """Return the number of elements of a tensor of this shape."""
    return math.prod(shape)
