"""Memory of one GPU, term by term, at the moment of a step that needs most.

Sources: arXiv:1910.02054 (ZeRO), arXiv:2305.14314 (NF4), torch's FSDP2 and DeepSpeed as read and
measured: sums of living tensors on real ranks under gloo (tests/distributed/test_plan_real.py).

Letters: P parameters of the base, n that train, R ranks, S ranks that share one copy, e bytes of
an element that computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.activations import (
    DTRAIN,
    Habits,
    head_bytes,
    recompute_bytes,
    saved_bytes,
)
from dtrain.planning.setup import Setup

# Of a linear layer held in NF4: 4 bits an element; for 64 elements one byte of scale; for 256 of
# those a float32 of the second quantisation. The scales are no parameters: no engine shards them.
NF4_BYTES = 0.5
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4
# Bytes of Adam's state for a parameter: two float32, or two bytes with a float32 for 256 of them.
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03, "paged_adamw_8bit": 2.03}
MOMENTS = ("loss", "backward", "update")


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights, gradients, optimizer: held all the time (gradients: from micro-batch to update).
        gathered: of other ranks' shares, at the peak.
        activations: kept for the backward pass.
        working: what the moment itself needs: logits, a recomputed layer, an update's copies.
        buffers: an engine's own, for sending.
        moment: loss, backward or update: when the peak is.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    working: float
    buffers: float
    moment: str

    @property
    def peak(self) -> float:
        """Sum of living tensors at the peak."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.activations
            + self.working
            + self.buffers
        )

    def terms(self) -> dict[str, float]:
        """Name → bytes, in the order that people read them."""
        names = ("weights", "gradients", "optimizer", "gathered", "activations")
        return {name: getattr(self, name) for name in (*names, "working", "buffers")}


def memory_of(setup: Setup, habits: Habits = DTRAIN) -> Memory:
    """The moment of a step that needs most."""
    return max((at(setup, habits) for at in AT), key=lambda moment: moment.peak)


def least_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """The peak that no data can make smaller: of logits there are as many as tokens are learnt."""
    if setup.learns_all:
        return memory_of(setup, habits).peak
    return max(at(setup, habits).peak for at in AT if at is not at_loss)


def at_loss(setup: Setup, habits: Habits = DTRAIN) -> Memory:
    """The loss is computed: everything is saved, and the logits are there."""
    return _moment(
        setup,
        habits,
        "loss",
        gathered=_outer_gathered(setup, habits),
        activations=saved_bytes(setup, habits),
        working=head_bytes(setup, habits),
        buffers=_buffers(setup) if setup.engine == "zero3" else 0.0,
    )


def in_backward(setup: Setup, habits: Habits = DTRAIN) -> Memory:
    """The last decoder layer is gone through backwards."""
    layer = _layer_gathered(setup, habits)
    scatter = 0.0
    if setup.is_full and setup.engine == "fsdp2":  # a layer's gradients, and their float32 copy
        scatter = (setup.element_bytes + FLOAT32) * setup.shape.layer_parameters
    dequantised = 0.0
    if setup.method == "qlora":
        dequantised = setup.element_bytes * max(x.elements for x in setup.shape.linears)
    return _moment(
        setup,
        habits,
        "backward",
        gathered=_outer_gathered(setup, habits) + layer + scatter,
        activations=saved_bytes(setup, habits),
        working=recompute_bytes(setup, habits) + dequantised + _head_gradient(setup, habits),
        buffers=_buffers(setup),
    )


def _head_gradient(setup: Setup, habits: Habits) -> float:
    """Of the output matrix, where it waits for the end of the backward pass.

    A tied one is added to that of the embeddings; FSDP2 reduces it with them.
    """
    shape, sharded = setup.shape, setup.engine == "fsdp2"
    if not setup.is_full or setup.engine in ("zero2", "zero3") or not (sharded or shape.tied):
        return 0.0
    width = setup.element_bytes if sharded else habits.train_bytes
    return float(width * shape.vocabulary * shape.hidden)


def after_layers(setup: Setup, habits: Habits = DTRAIN) -> Memory:
    """The backward pass ends: FSDP2 reduces, in float32, what lies outside the layers."""
    shape, e = setup.shape, setup.element_bytes
    if not setup.is_full or setup.engine != "fsdp2" or setup.shard == 1:
        return in_backward(setup, habits)
    sent = FLOAT32 * (shape.outer_parameters + shape.layer_parameters)
    return _moment(
        setup,
        habits,
        "backward",
        gathered=_outer_gathered(setup, habits) + sent,
        activations=0.0,
        working=2.0 * e * shape.vocabulary * shape.hidden,  # of embeddings and output matrix
        buffers=0.0,
    )


def at_update(setup: Setup, habits: Habits = DTRAIN) -> Memory:
    """The optimizer works: activations are gone, gradients are whole."""
    mine = setup.trainable / _update_shares(setup)
    # torch: a root of the second moment for each parameter, of all at once on GPUs.
    # DeepSpeed: float32 gradients beside those that were reduced, and the optimizer's own.
    copies = (
        16.0 * mine
        if setup.engine in ("zero2", "zero3")
        else habits.train_bytes * mine * setup.foreach
    )
    return _moment(
        setup,
        habits,
        "update",
        gathered=0.0,
        activations=0.0,
        working=0.0 if setup.offload else copies,
        buffers=_buffers(setup) if setup.engine == "zero3" else 0.0,
    )


AT = (at_loss, in_backward, after_layers, at_update)


def _moment(
    setup: Setup,
    habits: Habits,
    moment: str,
    *,
    gathered: float,
    activations: float,
    working: float,
    buffers: float,
) -> Memory:
    gradients = gradient_bytes(setup, habits)
    if moment == "update" and setup.engine == "fsdp2":
        gradients = habits.train_bytes * setup.trainable / setup.shard
    return Memory(
        weights=weight_bytes(setup, habits),
        gradients=0.0 if setup.offload else gradients,
        optimizer=0.0 if setup.offload else optimizer_bytes(setup, habits),
        gathered=gathered,
        activations=activations,
        working=working,
        buffers=buffers,
        moment=moment,
    )


def weight_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """Weights that this rank keeps, and the copies that computing makes of all of them."""
    shape, e = setup.shape, setup.element_bytes
    shares = 1 if setup.engine in ("ddp", "zero2") else setup.shard
    if setup.is_full:
        return _full_weight_bytes(setup, shares, habits)
    adapter = e if setup.engine in ("zero2", "zero3") else habits.train_bytes
    trains = adapter * setup.trainable / shares
    if setup.offload:
        return _scales(setup)
    if setup.method == "lora":
        return e * shape.parameters / shares + trains
    packed = NF4_BYTES * shape.linear_elements
    others = e * (shape.parameters - shape.linear_elements)
    return (packed + others) / shares + _scales(setup) + trains


def _scales(setup: Setup) -> float:
    return NF4_SCALE_BYTES * setup.shape.linear_elements if setup.method == "qlora" else 0.0


def _full_weight_bytes(setup: Setup, shares: int, habits: Habits) -> float:
    """float32 under torch's engines, and in 16 bits beside float32 masters under DeepSpeed."""
    parameters, e = setup.shape.parameters, setup.element_bytes
    if setup.offload:
        return 0.0
    if setup.engine in ("zero2", "zero3"):
        return e * parameters / shares
    # Under DDP autocast keeps a 16-bit copy of every matrix until the backward pass is over.
    copies = e * setup.shape.linear_elements if setup.engine == "ddp" and setup.autocasts else 0
    return habits.train_bytes * parameters / shares + copies


def gradient_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """From one micro-batch to the next, as far as this rank keeps them."""
    n = setup.trainable
    if setup.engine == "ddp":  # what is not sent yet lies beside the buckets
        return habits.train_bytes * n * (2 if setup.accumulation > 1 and setup.ranks > 1 else 1)
    if setup.engine == "fsdp2":
        # An adapter's gradient stays whole until the last micro-batch, and is sent once.
        whole = not setup.is_full and setup.accumulation > 1
        return habits.train_bytes * n / (1 if whole else setup.shard)
    if setup.engine == "zero2":  # what was reduced, and what it is added to
        return (2 + (setup.accumulation > 1)) * FLOAT32 * n / setup.ranks
    return setup.element_bytes * n / setup.shard


def _update_shares(setup: Setup) -> int:
    """Ranks among which the optimizer's state is divided."""
    return {"ddp": 1, "zero2": setup.ranks}.get(setup.engine, setup.shard)


def optimizer_bytes(setup: Setup, habits: Habits = DTRAIN) -> float:
    """Adam's two moments, and DeepSpeed's float32 masters, of this rank's share."""
    masters = FLOAT32 if setup.engine in ("zero2", "zero3") else 0
    mine = setup.trainable / _update_shares(setup)
    moments = ADAM_BYTES[setup.optimizer]
    if setup.optimizer == "adamw":
        moments *= habits.train_bytes / FLOAT32
    return (moments + masters) * mine


def _gather_bytes(setup: Setup, habits: Habits) -> tuple[float, float]:
    """A whole decoder layer, and what lies outside all of them, as it computes."""
    shape, e = setup.shape, setup.element_bytes
    layer = float(e * shape.layer_parameters)
    if setup.method == "qlora":
        linears = shape.linear_elements / shape.layers
        layer = NF4_BYTES * linears + e * (shape.layer_parameters - linears)
    adapter = e if setup.engine == "zero3" else habits.train_bytes
    return layer + adapter * setup.trainable / shape.layers * (not setup.is_full), (
        e * shape.outer_parameters
    )


def _outer_gathered(setup: Setup, habits: Habits) -> float:
    """Embeddings and output matrix, whole while the decoder layers come and go."""
    if setup.shard == 1 or not setup.is_sharded:
        return 0.0
    layer, outer = _gather_bytes(setup, habits)
    if setup.engine == "fsdp2":
        return outer
    # ZeRO-3 lets go of nothing that it will need again within `live_elements`.
    return min(outer + setup.shape.layers * layer, setup.element_bytes * setup.live_elements)


def _layer_gathered(setup: Setup, habits: Habits) -> float:
    """The decoder layer that computes, and the next one on its way."""
    if setup.shard == 1 or not setup.is_sharded or setup.engine == "zero3":
        return 0.0
    return 2 * _gather_bytes(setup, habits)[0]


def _buffers(setup: Setup) -> float:
    """DeepSpeed's: gradients on their way; two for ZeRO-2, which sends one while it fills one."""
    count = {"zero2": 2, "zero3": 1}.get(setup.engine, 0)
    return float(count * setup.element_bytes * setup.bucket_elements)
