"""What a rank holds all through a step: weights, gradients, the optimizer's state.

Sources: arXiv:1910.02054 (ZeRO), arXiv:2305.14314 (NF4), torch's FSDP2 and DeepSpeed as read.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain

from dtrain.planning.activations import DTRAIN, TrainerProfile, keeps_wide
from dtrain.planning.parameters import (
    FLOAT32,
    NF4_SCALE_BYTES,
    ParameterSpec,
    layer_parameters,
    outer_parameters,
)
from dtrain.planning.workload import ZERO, Workload

# Bytes of Adam's state for a parameter: two float32, or two bytes with a float32 for 256 of them.
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}


def weight_bytes(
    workload: Workload, profile: TrainerProfile = DTRAIN, *, computing: bool = True
) -> float:
    """Weights that this rank keeps, and if `computing` the copies that are made of all of them."""
    scales = NF4_SCALE_BYTES * workload.shape.linear_elements if workload.method == "qlora" else 0.0
    if workload.offload:
        return scales
    # Under DDP autocast keeps a 16-bit copy of every matrix until the backward pass is over.
    copied = computing and keeps_wide(workload)
    copies = workload.element_bytes * workload.shape.linear_elements if copied else 0
    layer = sum(_kept(one, workload) for one in layer_parameters(workload, profile.train_bytes))
    outer = sum(_kept(one, workload) for one in outer_parameters(workload, profile.train_bytes))
    return workload.shape.layers * layer + outer + scales + copies


def _kept(one: ParameterSpec, workload: Workload) -> int:
    if workload.engine == "fsdp2":
        return one.kept * one.row_share(workload.shard)
    return one.kept * (one.share(workload.shard) if workload.engine == "zero3" else one.elements)


def trained_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """One float32 (or what the trainer takes) for each parameter that trains, of a rank's share."""
    return profile.train_bytes * workload.trainable / update_shares(workload)


def update_shares(workload: Workload) -> int:
    """Ranks among which the optimizer's state is divided."""
    return {"ddp": 1, "zero2": workload.ranks}.get(workload.engine, workload.shard)


def gradient_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """From one micro-batch to the next, as far as this rank keeps them."""
    n, again = workload.trainable, workload.accumulation > 1
    if workload.offload:
        return 0.0
    if workload.engine == "ddp":  # what is not sent yet lies beside the buckets, on one rank too
        return profile.train_bytes * n * (2 if again else 1)
    if workload.engine == "fsdp2":
        # An adapter's gradient stays whole until the last micro-batch, and is sent once.
        whole = not workload.is_full and again
        return profile.train_bytes * n / (1 if whole else workload.shard)
    if workload.engine == "zero2":  # made in each backward pass, added to what is there
        return partition_bytes(workload) if again else 0.0
    return FLOAT32 * n / workload.shard


def optimizer_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Adam's two moments, and DeepSpeed's float32 masters, of this rank's share."""
    if workload.offload:
        return 0.0
    masters = FLOAT32 if workload.engine in ZERO else 0
    mine = workload.trainable / update_shares(workload)
    moments = ADAM_BYTES[workload.optimizer]
    if workload.optimizer == "adamw":
        moments *= profile.train_bytes / FLOAT32
    return (moments + masters) * mine


def partition_bytes(workload: Workload) -> float:
    """ZeRO-2's gradients of one rank, float32: of every parameter in its range, the whole."""
    inner, outer = layer_parameters(workload), outer_parameters(workload)
    layer, first, *rest = (
        tuple(one.elements for one in some if one.trains) for some in (inner, outer[:1], outer[1:])
    )
    fullest = _fullest(layer, workload.shape.layers, first, rest[0], workload.ranks)
    return float(FLOAT32 * fullest)


@lru_cache(maxsize=256)
def _fullest(
    layer: tuple[int, ...], layers: int, first: tuple[int, ...], last: tuple[int, ...], ranks: int
) -> int:
    """Elements of the parameters that a rank's equal range of all of them touches, at most."""
    sizes = [*first, *layer * layers, *last]
    total, end, whole = sum(sizes), 0, [0] * ranks
    for size in sizes:
        start, end = end, end + size
        for rank in range(start * ranks // total, (end - 1) * ranks // total + 1):
            whole[rank] += size
    return max(whole)


def largest_trained(workload: Workload) -> int:
    """Elements of the largest parameter that trains."""
    both = chain(layer_parameters(workload), outer_parameters(workload))
    return max(one.elements for one in both if one.trains)
