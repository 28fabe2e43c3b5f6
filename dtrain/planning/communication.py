"""Bytes that travel for one optimizer step, inside nodes and between them.

Every collective goes around a ring of g ranks: an all-gather or a reduce-scatter of B bytes brings
each rank (g-1)/g B, an all-reduce twice that. A ring over several nodes enters each node once, so
what enters a node is what one rank receives, whatever number of ranks the node has.

Letters: n parameters that train, S ranks that share one copy, e bytes of an element that computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning import zero3
from dtrain.planning.parameters import (
    FLOAT32,
    layer_parameters,
    outer_parameters,
    padded_bytes,
)
from dtrain.planning.workload import Workload


@dataclass(frozen=True)
class Collective:
    """One kind of it, summed over an optimizer step.

    Attributes:
        received: bytes that a rank receives.
        group: ranks that take part.
        crosses: the group has ranks of several nodes.
        entering: bytes that enter a node.
    """

    name: str
    received: float
    group: int
    crosses: bool
    entering: float


def collectives_of(workload: Workload) -> list[Collective]:
    """What an engine sends for one optimizer step; what moves nothing is left out."""
    kinds = {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": _zero2, "zero3": _zero3}
    return [one for one in kinds[workload.engine](workload) if one.received]


def received_bytes(workload: Workload) -> float:
    """That a rank receives in an optimizer step."""
    return sum(one.received for one in collectives_of(workload))


def entering_bytes(workload: Workload) -> float:
    """That enter a node in an optimizer step."""
    return sum(one.entering for one in collectives_of(workload))


def _ring(workload: Workload, name: str, group: int, size: float, passes: int = 1) -> Collective:
    """A collective of `size` bytes among `group` neighbouring ranks."""
    received = passes * size * (group - 1) / group
    crosses = group > workload.node_ranks
    return Collective(name, received, group, crosses, received if crosses else 0.0)


def _ddp(workload: Workload) -> list[Collective]:
    return [_ring(workload, "gradients", workload.ranks, FLOAT32 * workload.trainable, 2)]


def _fsdp2(workload: Workload) -> list[Collective]:
    """Layers are gathered forward and backward, the rest once; padded to equal rows."""
    shard, micro = workload.shard, workload.accumulation
    layer, outer = layer_parameters(workload), outer_parameters(workload)
    layers = workload.shape.layers
    weights = 2 * layers * padded_bytes(layer, shard) + padded_bytes(outer, shard)
    inner, rest = (sum(x.row_share(shard) for x in some if x.trains) for some in (layer, outer))
    share = FLOAT32 * (layers * inner + rest)
    sends = micro if workload.is_full else 1
    groups = workload.ranks // shard
    between = 2 * share * (groups - 1) / groups * sends
    crosses = workload.ranks > workload.node_ranks and groups > 1
    entering = between * min(shard, workload.node_ranks) if crosses else 0.0
    return [
        _ring(workload, "weights", shard, weights * micro),
        _ring(workload, "gradients", shard, shard * share * sends),
        Collective("gradients of groups", between, groups, crosses, entering),
    ]


def _zero2(workload: Workload) -> list[Collective]:
    """Gradients are reduced after every micro-batch; weights are gathered after the update."""
    gradients, weights = FLOAT32 * workload.trainable, workload.element_bytes * workload.trainable
    return [
        _ring(workload, "gradients", workload.ranks, gradients * workload.accumulation, 2),
        _ring(workload, "weights", workload.ranks, weights),
    ]


def _zero3(workload: Workload) -> list[Collective]:
    """As DeepSpeed's rules have it; what is small and stays whole is gathered once a step."""
    e, found = workload.element_bytes, zero3.gathered(workload)
    weights = e * (found.received * workload.accumulation + found.persistent)
    return [
        _ring(workload, "weights", workload.ranks, weights),
        _ring(
            workload,
            "gradients",
            workload.ranks,
            FLOAT32 * workload.trainable * workload.accumulation,
        ),
    ]
