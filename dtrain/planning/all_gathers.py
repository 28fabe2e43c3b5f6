"""What an engine gathers of other ranks' shares, part by part of a micro-batch.

FSDP2 as torch does it (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py): a group of
parameters arrives in one buffer and is copied out of it into each parameter's own; the buffer is
let go of only when the next group has been copied out. What lies outside the decoder layers is one
group, gathered first and kept; a layer is gathered for itself, and in the backward pass the one
before it too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.planning import zero3
from dtrain.planning.activations import TrainerProfile
from dtrain.planning.parameters import (
    layer_parameters,
    outer_parameters,
    padded_bytes,
    sent_bytes,
)
from dtrain.planning.workload import Workload


@dataclass(frozen=True)
class Gather:
    """A part of a micro-batch.

    Attributes:
        part: first (the embeddings are looked up), arrival (a layer is copied), forward (it
            computes), loss, backward (into a layer's MLP) or attention (out of it).
        depth: share of all layers whose activations are kept.
        size: bytes that are gathered.
    """

    part: str
    depth: float
    size: float


def gathers(workload: Workload, profile: TrainerProfile) -> Iterator[Gather]:
    """The parts that could need most."""
    if workload.engine == "fsdp2":
        yield from _fsdp2(workload, profile)
    elif workload.engine == "zero3":
        yield from _zero3(workload)
    else:
        yield from (Gather(part, 1.0, 0.0) for part in ("forward", "loss", "backward"))
        if workload.engine == "zero2" and workload.trainable > workload.bucket_elements:
            yield Gather("backward", 1 - workload.bucket_elements / workload.trainable, 0.0)


def _fsdp2(workload: Workload, profile: TrainerProfile) -> Iterator[Gather]:
    outer = padded_bytes(outer_parameters(workload, profile.train_bytes), workload.shard)
    layer = padded_bytes(layer_parameters(workload, profile.train_bytes), workload.shard)
    buffer, rest = layer, outer + layer
    if workload.shard == 1:  # nothing arrives, but weights are copied
        buffer = 0.0
    else:
        yield Gather("first", 0.0, 2 * outer + 2 * layer)
    last = 1 - 1 / workload.shape.layers
    yield Gather(zero3.ARRIVAL, last, rest + 2 * buffer)
    yield Gather("forward", 1.0, rest + buffer)
    yield Gather("loss", 1.0, outer + buffer)
    # A layer's gradients as they come, and beside them what the layer after it sent.
    e, sent = workload.element_bytes, 0.0
    if workload.shard > 1:
        sent = sent_bytes(layer_parameters(workload, profile.train_bytes), workload.shard)
    first, every = (
        max(linear.elements for linear in workload.shape.linears),
        workload.shape.layer_parameters,
    )
    for depth, other in ((1.0, 0.0), (last, sent)):
        own = e * first * workload.is_full
        yield Gather("backward", depth, rest + buffer + other + own)
        if workload.is_full:
            yield Gather("attention", depth, rest + buffer + other + e * every)


def _zero3(workload: Workload) -> Iterator[Gather]:
    for moment in zero3.gathered(workload).moments:
        part = "first" if moment.phase == zero3.FORWARD and not moment.depth else moment.phase
        if part != zero3.END:
            depth = moment.depth / workload.shape.layers
            yield Gather(part, depth, float(workload.element_bytes * moment.elements))
