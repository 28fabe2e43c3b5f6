"""Memory of one GPU, term by term, at the moment of a step that needs most.

Each engine is gone through moment by moment, as torch and DeepSpeed were read and measured: sums of
living tensors on real ranks under gloo (tests/distributed/test_plan_real.py), and on fake ones
(dtrain/simulation).

Letters: P parameters, n that train, R ranks, S ranks that share one copy, V vocabulary, h hidden
size, e bytes of an element that computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from dtrain.planning import zero3
from dtrain.planning.activations import (
    DTRAIN,
    TrainerProfile,
    attention_bytes,
    forward_bytes,
    head_bytes,
    recompute_bytes,
    saved_bytes,
    stream_bytes,
)
from dtrain.planning.all_gathers import Gather, gathers
from dtrain.planning.parameters import (
    FLOAT32,
    layer_parameters,
    outer_parameters,
    padded_bytes,
    sent_bytes,
)
from dtrain.planning.static_memory import (
    gradient_bytes,
    largest_trained,
    optimizer_bytes,
    partition_bytes,
    trained_bytes,
    weight_bytes,
)
from dtrain.planning.workload import ZERO, Workload

PARTS = {"first": "gather", zero3.ARRIVAL: "forward", "attention": "backward"}
FLOAT64 = 8
SUB_GROUP_ELEMENTS = 1_000_000_000  # ZeRO-3 updates as many of a rank's at once


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU.

    Attributes:
        weights, gradients, optimizer: held all the time (gradients: from micro-batch to update).
        gathered: of other ranks' shares, at the peak.
        activations: kept for the backward pass.
        working: what the moment itself needs: logits, a recomputed layer, an update's copies.
        buffers: an engine's own, for sending.
        moment: loading, gather (the first), forward, loss, backward or update: when the peak is.
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
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        """Name → bytes, in the order that people read them."""
        names = ("weights", "gradients", "optimizer", "gathered", "activations")
        return {name: getattr(self, name) for name in (*names, "working", "buffers")}


def estimate_memory(workload: Workload, profile: TrainerProfile = DTRAIN) -> MemoryEstimate:
    """The moment of a step that needs most."""
    return max(moments(workload, profile), key=lambda moment: moment.peak)


def least_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """The peak that no data can make smaller: of logits there are as many as tokens are learnt."""
    if workload.trains_on_all_tokens:
        return estimate_memory(workload, profile).peak
    return max(one.peak for one in moments(workload, profile) if one.moment != "loss")


def moments(workload: Workload, profile: TrainerProfile = DTRAIN) -> list[MemoryEstimate]:
    """Every moment of a step that could need most."""
    held = _Held(workload, profile)
    return [
        *held.of_loading(),
        *map(held.at_gather, held.gathers),
        *held.of_head_gradients(),
        *held.of_reduction(),
        *held.of_update(),
    ]


class _Held:
    """What a rank holds anyway, to which each moment adds."""

    def __init__(self, workload: Workload, profile: TrainerProfile) -> None:
        self.workload, self.profile = workload, profile
        self.weights = weight_bytes(workload, profile)
        self.gradients = gradient_bytes(workload, profile)
        self.optimizer = optimizer_bytes(workload, profile)
        self.saved = saved_bytes(workload, profile)
        self.gathers = list(gathers(workload, profile))
        # ZeRO-2 fills it in 16 bits and reduces a float32 copy; ZeRO-3 fills it in float32.
        wide = workload.element_bytes if workload.engine == "zero2" else FLOAT32
        self.buffer = float(wide * workload.bucket_elements)
        self.small = 0.0  # parameters that ZeRO-3 keeps whole for being small
        if workload.engine == "zero3":
            self.small = float(workload.element_bytes * zero3.gathered(workload).persistent)
        self.matrix = float(workload.shape.vocabulary * workload.shape.hidden)

    def at(
        self,
        moment: str,
        *,
        gathered: float = 0.0,
        activations: float = 0.0,
        working: float = 0.0,
        gradients: float | None = None,
        buffers: float | None = None,
    ) -> MemoryEstimate:
        """One moment; what is not given is not there."""
        return MemoryEstimate(
            weights=self.weights,
            gradients=self.gradients if gradients is None else gradients,
            optimizer=self.optimizer,
            gathered=gathered + self.small,
            activations=activations,
            working=working,
            buffers=self.buffers(moment) if buffers is None else buffers,
            moment=moment,
        )

    def buffers(self, moment: str) -> float:
        """DeepSpeed's, for gradients on their way.

        ZeRO-2 has two in a backward pass, one that fills while the other is sent; ZeRO-3 keeps one.
        """
        if self.workload.engine == "zero2" and moment == "backward":
            return 2 * self.buffer
        return self.buffer if self.workload.engine == "zero3" else 0.0

    def of_loading(self) -> Iterator[MemoryEstimate]:
        """The base arrives: a block is whole until its share is cut out, a matrix until it is NF4.

        Nothing else is there yet; the engine has its last share when the last block comes.
        """
        workload = self.workload
        blocks = [layer_parameters(workload), outer_parameters(workload)]
        whole = max(sum(one.kept * one.elements for one in block) for block in blocks)
        packed = workload.method == "qlora" and max(x.elements for x in workload.shape.linears)
        base = weight_bytes(workload, self.profile, computing=False)
        yield MemoryEstimate(
            weights=base,
            gradients=0.0,
            optimizer=0.0,
            gathered=float(whole) if workload.is_sharded and workload.shard > 1 else 0.0,
            activations=0.0,
            working=float(workload.element_bytes * packed),
            buffers=0.0,
            moment="loading",
        )

    def at_gather(self, gather: Gather) -> MemoryEstimate:
        """A part of a micro-batch with what is gathered in it."""
        workload, gradients = self.workload, self.gradients
        moment = PARTS.get(gather.part, gather.part)
        if moment == "backward" and workload.engine == "zero2" and gather.depth < 1:
            gradients += partition_bytes(workload)  # a bucket was full
        return self.at(
            moment,
            gathered=gather.size,
            activations=self.saved * gather.depth,
            working=self.working[gather.part],
            gradients=gradients,
        )

    @cached_property
    def working(self) -> dict[str, float]:
        """Part of a micro-batch → what computing in it needs."""
        workload, profile = self.workload, self.profile
        return {
            "first": stream_bytes(workload, profile) * workload.shape.hidden * workload.tokens,
            zero3.ARRIVAL: 0.0,
            "forward": forward_bytes(workload, profile),
            "loss": head_bytes(workload, profile),
            "backward": recompute_bytes(workload, profile) + self.waiting(),
            "attention": attention_bytes(workload, profile) + self.waiting(),
        }

    def width(self) -> int:
        """Bytes of an element of a matrix's gradient as backward makes it."""
        torch_whole = self.workload.engine == "ddp"
        return self.profile.train_bytes if torch_whole else self.workload.element_bytes

    def waiting(self) -> float:
        """The output matrix's gradient: a tied one waits for that of the embeddings.

        FSDP2 reduces one that is not tied with them too.
        """
        workload = self.workload
        waits = workload.shape.tied or workload.engine == "fsdp2"
        return self.width() * self.matrix if workload.is_full and waits else 0.0

    def of_head_gradients(self) -> Iterator[MemoryEstimate]:
        """Full training: gradients as large as the vocabulary, before and after the layers."""
        workload = self.workload
        if not workload.is_full:
            return
        # What the loss made, and what backward scales it to; then ZeRO-2 gets itself buffers.
        matrix, early = self.width() * self.matrix, 0.0 if workload.engine == "zero2" else None
        kept = {"gathered": self.gathered_below(1.0), "activations": self.saved}
        yield self.at("backward", working=2 * matrix, buffers=early, **kept)
        yield self.at("backward", working=matrix, **kept)
        # The embeddings' own; a tied one beside it, and their sum.
        extra = 3 if workload.shape.tied else 2 if workload.engine == "fsdp2" else 1
        layer = 0.0
        if workload.engine == "fsdp2" and workload.shard > 1:
            layer = sent_bytes(
                layer_parameters(workload), workload.shard
            )  # the last that was reduced
        gradients = self.gradients
        if workload.engine == "zero2" and workload.trainable > workload.bucket_elements:
            gradients += partition_bytes(workload)
        if workload.engine == "ddp" and workload.accumulation == 2:
            gradients -= matrix  # the first micro-batch has not made it; the last sends as it goes
        outer, working = self.outer() + layer, extra * matrix
        yield self.at("backward", gathered=outer, working=working, gradients=gradients)

    def gathered_below(self, depth: float) -> float:
        """The most that is gathered while so many of the layers are left to go back through."""
        if self.workload.engine != "zero3":
            return self.outer()
        below = (x.size for x in self.gathers if x.part == zero3.BACKWARD and x.depth <= depth)
        return max(below, default=self.outer())

    def outer(self) -> float:
        """Embeddings and output matrix, where they are gathered while gradients flow."""
        workload = self.workload
        if not workload.is_sharded or workload.shard == 1:
            return 0.0
        if workload.engine == "zero3":  # the output matrix was given back before the layers
            return workload.element_bytes * self.matrix
        return padded_bytes(outer_parameters(workload), workload.shard)

    def of_reduction(self) -> Iterator[MemoryEstimate]:
        """Gradients are copied together, reduced and scattered."""
        workload, e = self.workload, self.workload.element_bytes
        copies = 1 if workload.on_gpu else 2  # gloo works on a copy
        together = min(workload.trainable, workload.bucket_elements)
        if workload.engine == "fsdp2" and workload.is_full and workload.shard > 1:
            sent = copies * sent_bytes(outer_parameters(workload), workload.shard)
            yield self.at("backward", gathered=e * workload.shape.outer_parameters + sent)
        done = min(1.0, workload.bucket_elements / workload.trainable)
        if workload.engine == "zero3" and not workload.offload:
            yield self.at(
                "backward",
                gathered=self.gathered_below(1 - done),
                activations=self.saved * (1 - done),
                working=float(copies * FLOAT32 * together),
            )
        if workload.engine == "zero2":
            # The first bucket that is full is copied before the partition is there.
            widened = FLOAT32 * together if e < FLOAT32 else 0
            copy = float(FLOAT32 * together / workload.ranks + widened)
            rest = max(0.0, self.saved * (1 - 2 * done))
            yield self.at("backward", activations=self.saved * (1 - done), working=copy)
            gradients = self.gradients + partition_bytes(workload)
            yield self.at("backward", activations=rest, working=copy, gradients=gradients)

    def of_update(self) -> Iterator[MemoryEstimate]:
        """The optimizer works: activations are gone, gradients are whole."""
        workload, mine = self.workload, trained_bytes(self.workload, self.profile)
        if workload.offload:
            yield self.at("update")
        elif workload.engine not in ZERO:
            yield self.at("update", gradients=mine)  # fused: no copy of any state
        else:
            yield from self.of_zero_update()

    def of_zero_update(self) -> Iterator[MemoryEstimate]:
        """DeepSpeed lays gradients end to end, in float32, and then updates."""
        workload, whole = self.workload, trained_bytes(self.workload)
        together, gradients, shares = whole, self.gradients, workload.shard
        if workload.engine == "zero3":
            together = min(whole, FLOAT32 * SUB_GROUP_ELEMENTS)
        else:
            gradients, shares = partition_bytes(workload), 1
        norm = FLOAT64 * min(largest_trained(workload) / shares, whole / FLOAT32)
        yield self.at("update", working=max(norm, together), gradients=gradients)
        kept = 0.0 if workload.engine == "zero2" else gradients
        yield self.at("update", working=together, gradients=kept)
