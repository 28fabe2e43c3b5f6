"""Bytes that travel for one optimizer step, inside nodes and between them.

Every collective goes around a ring of g ranks: an all-gather or a reduce-scatter of B bytes brings
each rank (g-1)/g B, an all-reduce twice that. A ring over several nodes enters each node once, so
what enters a node is what one rank receives, whatever number of ranks the node has.

Letters: n parameters that train, S ranks that share one copy, e bytes of an element that computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.memory import FLOAT32, NF4_BYTES
from dtrain.planning.setup import PERSISTENT_ELEMENTS, Setup


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


def collectives_of(setup: Setup) -> list[Collective]:
    """What an engine sends for one optimizer step; what moves nothing is left out."""
    kinds = {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": _zero2, "zero3": _zero3}
    return [one for one in kinds[setup.engine](setup) if one.received]


def received_bytes(setup: Setup) -> float:
    """That a rank receives in an optimizer step."""
    return sum(one.received for one in collectives_of(setup))


def entering_bytes(setup: Setup) -> float:
    """That enter a node in an optimizer step."""
    return sum(one.entering for one in collectives_of(setup))


def _ring(setup: Setup, name: str, group: int, size: float, passes: int = 1) -> Collective:
    """A collective of `size` bytes among `group` neighbouring ranks."""
    received = passes * size * (group - 1) / group
    crosses = group > setup.node_ranks
    return Collective(name, received, group, crosses, received if crosses else 0.0)


def _ddp(setup: Setup) -> list[Collective]:
    return [_ring(setup, "gradients", setup.ranks, FLOAT32 * setup.trainable, 2)]


def _fsdp2(setup: Setup) -> list[Collective]:
    n, shard, micro = setup.trainable, setup.shard, setup.accumulation
    sends = micro if setup.is_full else 1
    groups = setup.ranks // shard
    between = 2 * FLOAT32 * n / shard * (groups - 1) / groups * sends
    crosses = setup.ranks > setup.node_ranks and groups > 1
    entering = between * min(shard, setup.node_ranks) if crosses else 0.0
    return [
        _ring(setup, "weights", shard, _gathered(setup) * micro),
        _ring(setup, "gradients", shard, FLOAT32 * n * sends),
        Collective("gradients of groups", between, groups, crosses, entering),
    ]


def _gathered(setup: Setup) -> float:
    """Bytes gathered for a micro-batch: layers forward and backward, the rest once."""
    shape, e = setup.shape, setup.element_bytes
    inner, outer = shape.parameters - shape.outer_parameters, shape.outer_parameters
    layers = float(e * inner)
    if setup.method == "qlora":
        layers = NF4_BYTES * shape.linear_elements + e * (inner - shape.linear_elements)
    if setup.engine == "zero3":
        layers += e * _partitioned(setup)
        stays = shape.parameters <= setup.live_elements
        return layers * (1 if stays else 2) + e * outer
    return 2 * (layers + FLOAT32 * setup.trainable * (not setup.is_full)) + e * outer


def _partitioned(setup: Setup) -> int:
    """Adapter weights that ZeRO-3 does not keep whole everywhere for being small."""
    layers, r = setup.shape.layers, setup.rank
    sizes = [r * side for x in setup.adapted for side in (x.inputs, x.outputs)]
    return layers * sum(size for size in sizes if size > PERSISTENT_ELEMENTS)


def _zero2(setup: Setup) -> list[Collective]:
    """Gradients are reduced after every micro-batch; weights are gathered after the update."""
    size = setup.element_bytes * setup.trainable
    return [
        _ring(setup, "gradients", setup.ranks, size * setup.accumulation, 2),
        _ring(setup, "weights", setup.ranks, size),
    ]


def _zero3(setup: Setup) -> list[Collective]:
    """Layers twice, or once where all of them stay alive until the backward pass.

    Close, not exact: which weights stay depends on a trace that DeepSpeed makes.
    """
    size = setup.element_bytes * setup.trainable
    return [
        _ring(setup, "weights", setup.ranks, _gathered(setup) * setup.accumulation),
        _ring(setup, "gradients", setup.ranks, size * setup.accumulation),
    ]
