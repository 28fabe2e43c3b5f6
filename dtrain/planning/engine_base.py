"""Memory and communication of one rank in an optimizer step: what is common to all engines.

`dtrain.planning.engine_models` has one subclass of `EngineModel` for each engine. A model goes
through a step moment by moment and sums the tensors that exist at each. The terms follow the
sources of torch and DeepSpeed and agree with the living tensors of real ranks under gloo
(tests/distributed/test_plan_real.py) and of simulated ranks (dtrain/simulation).

Letters: n parameters that train, R ranks, S ranks that share one copy of the base, V vocabulary,
h hidden size, e bytes of an element of the compute dtype.

Sources: arXiv:1910.02054 (ZeRO), arXiv:2305.14314 (NF4).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from dtrain.planning import teacher
from dtrain.planning.activations import (
    DTRAIN,
    TrainerProfile,
    attention_backward_bytes,
    backward_bytes,
    computes_from_float32,
    forward_bytes,
    head_bytes,
    saved_bytes,
    stream_bytes,
)
from dtrain.planning.memory_estimate import MOMENTS, GatherPoint, MemoryEstimate
from dtrain.planning.parameters import (
    FLOAT32,
    NF4_SCALE_BYTES,
    ParameterSpec,
    layer_copies,
    layer_parameters,
    outer_copies,
    outer_parameters,
)
from dtrain.planning.workload import Workload


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in an optimizer step.

    They run as rings: among g ranks, an all-gather or reduce-scatter of B bytes brings each rank
    (g-1)/g B, an all-reduce twice that. A ring over several nodes enters each node once, so what
    enters a node is what one rank receives, however many ranks the node has.

    Attributes:
        received: bytes that a rank receives.
        crosses: the group has ranks on several nodes.
        entering: bytes that enter a node.
        between_nodes: ranks of one node are in different groups, so none of `received` travels
            inside a node where the group crosses nodes.
    """

    name: str
    received: float
    crosses: bool
    entering: float
    between_nodes: bool = False


class EngineModel(ABC):
    """Memory and communication of one rank under one engine.

    Attributes:
        delays_head_gradient: an untied output matrix's gradient exists until the embeddings' does.
        kinds: the number of decoder layers of each kind, and the parameters of one.
        layer, outer: parameters of the largest decoder layer, and those outside the layers.
        matrix_elements: elements of the embedding matrix, V h.
    """

    delays_head_gradient = False

    def __init__(self, workload: Workload, profile: TrainerProfile = DTRAIN) -> None:
        self.workload, self.profile = workload, profile
        width = profile.train_bytes
        self.kinds = [
            (
                kind.shape.layers,
                layer_parameters(kind, width) + layer_copies(workload, kind.shape, width),
            )
            for kind in workload.kinds
        ]
        self.layer = max((layer for _, layer in self.kinds), key=_elements)
        self.outer = outer_parameters(workload, width) + outer_copies(workload, width)
        self.matrix_elements = float(workload.shape.vocabulary * workload.shape.hidden)

    # Results.

    def peak_memory(self) -> MemoryEstimate:
        """Memory at the moment of a step that needs most."""
        return max(self.moments(), key=lambda moment: moment.peak)

    def least_bytes(self) -> float:
        """The peak that remains for any data: there are as many logits as targets."""
        moments = self.moments()
        if not self.workload.trains_on_all_tokens:
            moments = [moment for moment in moments if moment.moment != "loss"]
        return max(moment.peak for moment in moments)

    def moments(self) -> list[MemoryEstimate]:
        """Memory at every moment of a step that could need most."""
        return [
            *self.loading_moments(),
            *self.teacher_moments(),
            *map(self.gather_moment, self.gather_points()),
            *self.head_gradient_moments(),
            *self.reduction_moments(),
            *self.update_moments(),
        ]

    def collectives(self) -> list[Collective]:
        """What is sent in one optimizer step."""
        sent = teacher.sent_bytes(self.workload)
        gathers = [self.ring("teacher", self.workload.shard, sent)] if sent else []
        return [*self.own_collectives(), *gathers]

    @abstractmethod
    def own_collectives(self) -> list[Collective]:
        """What the engine sends in one optimizer step of the model that trains."""

    def received_bytes(self) -> float:
        """Bytes that a rank receives in an optimizer step."""
        return sum(x.received for x in self.collectives())

    def entering_bytes(self) -> float:
        """Bytes that enter a node in an optimizer step."""
        return sum(x.entering for x in self.collectives())

    def ring(self, name: str, group: int, size: float, passes: int = 1) -> Collective:
        """A collective of `size` bytes among `group` neighboring ranks."""
        received = passes * size * (group - 1) / group
        crosses = group > self.workload.node_ranks
        return Collective(name, received, crosses, received if crosses else 0.0)

    # Memory that exists during the whole step.

    def kept_elements(self, parameter: ParameterSpec) -> int:
        """Elements of a parameter that this rank keeps."""
        return parameter.elements

    @cached_property
    def loaded_bytes(self) -> float:
        """Weights that this rank keeps, with the scales of NF4 and with a teacher's."""
        workload, shape = self.workload, self.workload.shape
        kept = teacher.kept_bytes(workload)
        if workload.traits.quantizes_base:
            kept += NF4_SCALE_BYTES * shape.packed_elements
        if workload.offload:
            return kept
        frozen = 1 - workload.trained_share if workload.traits.trains_base else 0.0
        for kind, (layers, layer) in zip(workload.kinds, self.kinds, strict=True):
            kept += layers * (1 - frozen) * self._kept_bytes(layer)
            if frozen:
                frozen_layer = layer_parameters(kind, self.profile.train_bytes, frozen=True)
                kept += layers * frozen * self._kept_bytes(frozen_layer)
        return kept + self._kept_bytes(self.outer)

    def _kept_bytes(self, parameters: Sequence[ParameterSpec]) -> float:
        return sum(x.kept * self.kept_elements(x) for x in parameters)

    @cached_property
    def weight_bytes(self) -> float:
        """Weights that this rank keeps, and autocast's copies of float32 matrices in 16 bits.

        Autocast keeps the copies until the backward pass is over.
        """
        if self.workload.offload or not computes_from_float32(self.workload):
            return self.loaded_bytes
        copied = self.workload.trained_linear_elements
        return self.loaded_bytes + self.workload.element_bytes * copied

    @property
    def optimizer_ranks(self) -> float:
        """Ranks among which the optimizer's state is divided."""
        capabilities = self.workload.capabilities
        if not capabilities.shards_optimizer:
            return 1
        return self.workload.shard if capabilities.shards_base else self.workload.ranks

    @cached_property
    def optimizer_bytes(self) -> float:
        """The optimizer's state, DeepSpeed's float32 master weights and other values that are kept
        of what trains, of this rank's share."""
        workload = self.workload
        if workload.offload:
            return 0.0
        state = workload.optimizer_state_bytes
        if workload.optimizer == "adamw":
            state *= self.profile.train_bytes / FLOAT32
        masters = FLOAT32 * workload.trainable if workload.capabilities.is_deepspeed else 0
        kept = FLOAT32 * workload.kept_values * workload.trainable
        return (state + masters + kept) / self.optimizer_ranks

    @property
    @abstractmethod
    def gradient_bytes(self) -> float:
        """Gradients that this rank keeps from one micro-batch to the next."""

    @cached_property
    def saved(self) -> float:
        """Activations of all layers, saved for the backward pass."""
        return saved_bytes(self.workload, self.profile)

    def buffer_bytes(self, moment: str) -> float:
        """The engine's buffers for communication at a moment."""
        return 0.0

    def always_gathered_bytes(self) -> float:
        """Weights of other ranks' shares that are never freed."""
        return 0.0

    # Moments of a step.

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
        """One moment; gradients and buffers default to what exists at all times."""
        return MemoryEstimate(
            weights=self.weight_bytes,
            gradients=self.gradient_bytes if gradients is None else gradients,
            optimizer=self.optimizer_bytes,
            gathered=gathered + self.always_gathered_bytes(),
            activations=activations,
            working=working,
            buffers=self.buffer_bytes(moment) if buffers is None else buffers,
            moment=moment,
        )

    def loading_moments(self) -> Iterator[MemoryEstimate]:
        """The base is loaded: a block exists whole until sharded, a matrix until quantized.

        Nothing else exists yet, and when the last block arrives the rank has all other shares.
        """
        workload = self.workload
        largest = workload.shape.largest_packed if workload.traits.quantizes_base else 0
        blocks = (self.layer, self.outer)
        whole = max(sum(x.kept * x.elements for x in block) for block in blocks)
        is_sharded = workload.capabilities.shards_base and workload.shard > 1
        yield MemoryEstimate(
            weights=self.loaded_bytes,
            gradients=0.0,
            optimizer=0.0,
            gathered=float(whole) if is_sharded else 0.0,
            activations=0.0,
            working=float(workload.element_bytes * largest),
            buffers=0.0,
            moment="loading",
        )

    def teacher_moments(self) -> Iterator[MemoryEstimate]:
        """A teacher computes before the model that trains saves anything."""
        workload = self.workload
        if workload.teacher is not None:
            gathered = teacher.gathered_bytes(workload)
            yield self.at("teacher", gathered=gathered, working=teacher.working_bytes(workload))

    def gather_points(self) -> Iterator[GatherPoint]:
        """The points of a micro-batch that could be the peak; here nothing is gathered."""
        yield from (GatherPoint(phase, 1.0, 0.0) for phase in ("forward", "loss", "backward"))

    def gather_moment(self, point: GatherPoint) -> MemoryEstimate:
        """Memory at one point of a micro-batch."""
        return self.at(
            MOMENTS.get(point.phase, point.phase),
            gathered=point.gathered,
            activations=self.saved * point.depth,
            working=self.working_bytes(point.phase),
            gradients=self.gradients_at(point),
        )

    def gradients_at(self, point: GatherPoint) -> float:
        """Gradients that exist at a point of a micro-batch."""
        return self.gradient_bytes

    def working_bytes(self, phase: str) -> float:
        """What computing in a phase of a micro-batch needs."""
        workload, profile = self.workload, self.profile
        match phase:
            case "first":
                return stream_bytes(workload, profile) * workload.shape.hidden * workload.tokens
            case "forward":
                return forward_bytes(workload)
            case "loss":
                return head_bytes(workload, profile)
            case "backward":
                return backward_bytes(workload, profile) + self.waiting_gradient_bytes()
            case "attention":
                return attention_backward_bytes(workload, profile) + self.waiting_gradient_bytes()
        return 0.0

    def matrix_gradient_bytes(self) -> float:
        """Gradient of the embedding or output matrix as the backward pass computes it."""
        return self.workload.element_bytes * self.matrix_elements

    def waiting_gradient_bytes(self) -> float:
        """The output matrix's gradient; a tied one waits for that of the embeddings."""
        waits = self.workload.shape.tied or self.delays_head_gradient
        return self.matrix_gradient_bytes() if self.workload.trains_matrices and waits else 0.0

    def head_gradient_moments(self) -> Iterator[MemoryEstimate]:
        """Gradients as large as the vocabulary, where such train, before and after the layers."""
        if not self.workload.trains_matrices:
            return
        # The gradient that the loss computed, and the one that the backward pass scales it to.
        matrix, gathered = self.matrix_gradient_bytes(), self.gathered_in_backward(1.0)
        yield self.at(
            "backward",
            gathered=gathered,
            activations=self.saved,
            working=2 * matrix,
            buffers=self.first_backward_buffers(),
        )
        yield self.at("backward", gathered=gathered, activations=self.saved, working=matrix)
        # The embeddings' own gradient; with tied matrices also the head's, and their sum.
        matrices = 3 if self.workload.shape.tied else 2 if self.delays_head_gradient else 1
        yield self.at(
            "backward",
            gathered=self.gathered_outer_bytes() + self.last_reduced_bytes(),
            working=matrices * matrix,
            gradients=self.gradients_at_embeddings(),
        )

    def first_backward_buffers(self) -> float:
        """Buffers when the backward pass starts."""
        return self.buffer_bytes("backward")

    def gathered_in_backward(self, depth: float) -> float:
        """The most that is gathered while a fraction `depth` of the layers is still to come."""
        return self.gathered_outer_bytes()

    def gathered_outer_bytes(self) -> float:
        """Embeddings and output matrix, as far as they are gathered while gradients flow."""
        return 0.0

    def last_reduced_bytes(self) -> float:
        """Gradients of the last layer that are still being reduced at the embeddings."""
        return 0.0

    def gradients_at_embeddings(self) -> float:
        """Gradients that exist when the backward pass reaches the embeddings."""
        return self.gradient_bytes

    def reduction_moments(self) -> Iterator[MemoryEstimate]:
        """Gradients are copied together, reduced and scattered."""
        yield from ()

    def update_moments(self) -> Iterator[MemoryEstimate]:
        """The optimizer updates this rank's share; its fused kernel copies no state."""
        trained = self.profile.train_bytes * self.workload.trainable / self.optimizer_ranks
        yield self.at("update", gradients=trained)


def _elements(parameters: Sequence[ParameterSpec]) -> int:
    return sum(x.elements for x in parameters)
