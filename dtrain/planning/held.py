"""What a rank holds all through a step: weights, gradients, the optimizer's state.

Sources: arXiv:1910.02054 (ZeRO), arXiv:2305.14314 (NF4), torch's FSDP2 and DeepSpeed as read.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, chain

from dtrain.planning.activations import DTRAIN, Habits, keeps_wide
from dtrain.planning.parameters import (
    FLOAT32,
    NF4_SCALE_BYTES,
    Parameter,
    layer_parameters,
    outer_parameters,
)
from dtrain.planning.setup import ZERO, Setup

# Bytes of Adam's state for a parameter: two float32, or two bytes with a float32 for 256 of them.
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}


def weight_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """Weights that this rank keeps, and the copies that computing makes of all of them."""
    scales = NF4_SCALE_BYTES * setup.shape.linear_elements if setup.method == "qlora" else 0.0
    if setup.offload:
        return scales
    # Under DDP autocast keeps a 16-bit copy of every matrix until the backward pass is over.
    copies = setup.element_bytes * setup.shape.linear_elements if keeps_wide(setup) else 0
    layer = sum(_kept(one, setup) for one in layer_parameters(setup, habits.train_bytes))
    outer = sum(_kept(one, setup) for one in outer_parameters(setup, habits.train_bytes))
    return setup.shape.layers * layer + outer + scales + copies


def _kept(one: Parameter, setup: Setup) -> int:
    if setup.engine == "fsdp2":
        return one.kept * one.row_share(setup.shard)
    return one.kept * (one.share(setup.shard) if setup.engine == "zero3" else one.elements)


def trained_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """One float32 (or what the trainer takes) for each parameter that trains, of a rank's share."""
    return habits.train_bytes * setup.trainable / update_shares(setup)


def update_shares(setup: Setup) -> int:
    """Ranks among which the optimizer's state is divided."""
    return {"ddp": 1, "zero2": setup.ranks}.get(setup.engine, setup.shard)


def gradient_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """From one micro-batch to the next, as far as this rank keeps them."""
    n, again = setup.trainable, setup.accumulation > 1
    if setup.offload:
        return 0.0
    if setup.engine == "ddp":  # what is not sent yet lies beside the buckets
        return habits.train_bytes * n * (2 if again and setup.ranks > 1 else 1)
    if setup.engine == "fsdp2":
        # An adapter's gradient stays whole until the last micro-batch, and is sent once.
        whole = not setup.is_full and again
        return habits.train_bytes * n / (1 if whole else setup.shard)
    if setup.engine == "zero2":  # made in each backward pass, added to what is there
        return partition_bytes(setup) if again else 0.0
    return setup.element_bytes * n / setup.shard


def optimizer_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """Adam's two moments, and DeepSpeed's float32 masters, of this rank's share."""
    if setup.offload:
        return 0.0
    masters = FLOAT32 if setup.engine in ZERO else 0
    mine = setup.trainable / update_shares(setup)
    moments = ADAM_BYTES[setup.optimizer]
    if setup.optimizer == "adamw":
        moments *= habits.train_bytes / FLOAT32
    return (moments + masters) * mine


def partition_bytes(setup: Setup) -> float:
    """ZeRO-2's gradients of one rank: of every parameter that its range touches, the whole."""
    sizes = list(_trained(setup))
    total, ranks = sum(sizes), setup.ranks
    ends = list(accumulate(sizes))
    whole = [0] * ranks
    for end, size in zip(ends, sizes, strict=True):
        touched = range((end - size) * ranks // total, (end - 1) * ranks // total + 1)
        for rank in touched:
            whole[rank] += size
    return float(setup.element_bytes * max(whole))


def _trained(setup: Setup) -> Iterator[int]:
    """Elements of each parameter that trains, in the order of the model."""
    outer = outer_parameters(setup)
    inner = chain.from_iterable([layer_parameters(setup)] * setup.shape.layers)
    return (one.elements for one in chain(outer[:1], inner, outer[1:]) if one.trains)


def largest_trained(setup: Setup) -> int:
    """Elements of the largest parameter that trains."""
    return max(_trained(setup))
