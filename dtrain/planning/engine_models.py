"""Memory and communication of each engine; `dtrain.config.engines` names the model of each.

The rules follow torch (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py,
torch/nn/parallel/distributed.py) and DeepSpeed (deepspeed/runtime/zero/stage_1_and_2.py,
stage3.py). All amounts are bytes of one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

from dtrain.config.engines import ENGINES
from dtrain.core.lazy_import import import_object
from dtrain.planning.activations import DTRAIN, TrainerProfile
from dtrain.planning.engine_base import Collective, EngineModel
from dtrain.planning.memory_estimate import GatherPoint, MemoryEstimate
from dtrain.planning.parameters import FLOAT32, ParameterSpec, padded_bytes, reduced_bytes
from dtrain.planning.workload import Workload
from dtrain.planning.zero3_gathers import BACKWARD, END, FORWARD, GatherSchedule, simulate_gathers

FLOAT64 = 8
SUB_GROUP_ELEMENTS = 1_000_000_000  # ZeRO-3 updates as many elements of a rank at once


class DdpModel(EngineModel):
    """torch's DistributedDataParallel: every rank keeps everything, gradients are all-reduced."""

    @property
    def gradient_bytes(self) -> float:
        """Gradients that are not sent yet exist next to the buckets, even on one rank."""
        copies = 2 if self.workload.accumulation > 1 else 1
        return self.profile.train_bytes * self.workload.trainable * copies

    def matrix_gradient_bytes(self) -> float:
        """The gradient is as wide as the parameter."""
        return self.profile.train_bytes * self.matrix_elements

    def gradients_at_embeddings(self) -> float:
        """Gradients in the backward pass of the embeddings, of the micro-batch that has the most.

        Of two micro-batches, the first has no embedding gradient yet and the last sends it.
        """
        gradients = self.gradient_bytes
        if self.workload.accumulation == 2:
            gradients -= self.matrix_gradient_bytes()
        return gradients

    def own_collectives(self) -> list[Collective]:
        """One all-reduce of all gradients."""
        workload = self.workload
        return [self.ring("gradients", workload.ranks, FLOAT32 * workload.trainable, 2)]


class Fsdp2Model(EngineModel):
    """torch's fully_shard: rows of every parameter are sharded, and layers gathered one by one.

    A group of parameters arrives in one buffer, from which each is copied; the buffer is freed when
    the next group has been copied. The parameters outside the layers are one group, gathered first
    and kept; in the backward pass the layer before the current one is gathered too.
    """

    delays_head_gradient = True

    @property
    def _is_shared(self) -> bool:
        """Whether several ranks share a copy, so that weights are gathered."""
        return self.workload.shard > 1

    def kept_elements(self, parameter: ParameterSpec) -> int:
        """Elements of the rank's rows."""
        return parameter.row_share(self.workload.shard)

    @property
    def optimizer_ranks(self) -> float:
        """Ranks that share what trains, fewer where the fullest has more rows than an even share.

        Experts are rows: 48 ranks share 32 experts as 32 ranks do.
        """
        groups = [*self.kinds, (1, self.outer)]
        even = sum(n * x.elements for n, group in groups for x in group if x.trains)
        fullest = sum(n * _trained_rows(group, self.workload.shard) for n, group in groups)
        return even / fullest

    @property
    def gradient_bytes(self) -> float:
        """An adapter's gradients stay whole until the last micro-batch, and are reduced once."""
        workload = self.workload
        is_whole = not workload.method.trains_whole_modules and workload.accumulation > 1
        shares = 1 if is_whole else self.optimizer_ranks
        return self.profile.train_bytes * workload.trainable / shares

    def gather_points(self) -> Iterator[GatherPoint]:
        """A layer, the buffer that it arrives in, and the group outside the layers."""
        workload = self.workload
        outer = padded_bytes(self.outer, workload.shard)
        layer = padded_bytes(self.layer, workload.shard)
        buffer, gathered = layer, outer + layer
        if self._is_shared:
            yield GatherPoint("first", 0.0, 2 * outer + 2 * layer)
        else:  # nothing arrives, but weights are copied
            buffer = 0.0
        before_last = 1 - 1 / workload.shape.layers
        yield GatherPoint("arrival", before_last, gathered + 2 * buffer)
        yield GatherPoint("forward", 1.0, gathered + buffer)
        yield GatherPoint("loss", 1.0, outer + buffer)
        # The gradients of the current layer, and those of the previous one, which are being sent.
        e, trains_base = workload.element_bytes, workload.traits.trains_base
        sent = self.last_reduced_bytes()
        mlp_gradient = e * max(x.elements for x in workload.shape.linears) * trains_base
        layer_gradient = e * workload.shape.layer_parameters
        for depth, sending in ((1.0, 0.0), (before_last, sent)):
            yield GatherPoint("backward", depth, gathered + buffer + sending + mlp_gradient)
            if trains_base:
                yield GatherPoint("attention", depth, gathered + buffer + sending + layer_gradient)

    def gathered_outer_bytes(self) -> float:
        """The group outside the layers stays gathered."""
        return padded_bytes(self.outer, self.workload.shard) if self._is_shared else 0.0

    def last_reduced_bytes(self) -> float:
        """Gradients of one layer, float32 and padded."""
        return reduced_bytes(self.layer, self.workload.shard) if self._is_shared else 0.0

    def reduction_moments(self) -> Iterator[MemoryEstimate]:
        """Base training: the gradients outside the layers are reduced last."""
        workload = self.workload
        if workload.method.trains_outer and self._is_shared:
            copies = 1 if workload.on_gpu else 2  # gloo works on a copy
            sent = copies * reduced_bytes(self.outer, workload.shard)
            outer = workload.element_bytes * workload.shape.outer_parameters
            yield self.at("backward", gathered=outer + sent)

    def own_collectives(self) -> list[Collective]:
        """Layers are gathered in each pass, the rest once, padded to equal rows."""
        workload, shard, layers = self.workload, self.workload.shard, self.workload.shape.layers
        # The layer below the lowest that trains is gathered ahead, and not used.
        again = min(layers, round(layers * workload.backward_share) + 1)
        gathers = 1 + workload.extra_runs + again / layers
        weights = padded_bytes(self.outer, shard)
        weights += gathers * sum(n * padded_bytes(layer, shard) for n, layer in self.kinds)
        inner = sum(n * _trained_rows(layer, shard) for n, layer in self.kinds)
        outer = _trained_rows(self.outer, shard)
        share = FLOAT32 * (workload.backward_share * inner + outer)
        sends = workload.accumulation if workload.method.trains_whole_modules else 1
        replicas = workload.ranks // shard
        between = 2 * share * (replicas - 1) / replicas * sends
        crosses = workload.ranks > workload.node_ranks and replicas > 1
        entering = between * min(shard, workload.node_ranks) if crosses else 0.0
        return [
            self.ring("weights", shard, weights * workload.accumulation),
            self.ring("gradients", shard, shard * share * sends),
            Collective("gradients of replicas", between, crosses, entering, between_nodes=True),
        ]


class DeepSpeedModel(EngineModel):
    """What ZeRO-2 and ZeRO-3 share: gradient buckets, and an update from flat float32 copies."""

    @property
    def bucket_bytes(self) -> float:
        """One bucket of float32 gradients."""
        return float(FLOAT32 * self.workload.bucket_elements)

    @property
    def first_bucket(self) -> float:
        """Fraction of the backward pass after which the first bucket is full."""
        return min(1.0, self.workload.bucket_elements / self.workload.trainable)

    @property
    def largest_trained(self) -> int:
        """Elements of the largest parameter that trains."""
        return max(x.elements for x in (*self.layer, *self.outer) if x.trains)


class Zero2Model(DeepSpeedModel):
    """DeepSpeed's ZeRO-2: each rank keeps all weights and a partition of gradients and state."""

    @cached_property
    def partition_bytes(self) -> float:
        """Float32 gradients of the fullest rank; it keeps whole every parameter in its range."""
        layers = [x for n, layer in self.kinds for _ in range(n) for x in layer]
        parameters = (*self.outer[:1], *layers, *self.outer[1:])
        sizes = tuple(x.elements for x in parameters if x.trains)
        return float(FLOAT32 * _fullest_partition(sizes, self.workload.ranks))

    @property
    def _fills_a_bucket(self) -> bool:
        return self.workload.trainable > self.workload.bucket_elements

    @property
    def bucket_bytes(self) -> float:
        """One bucket, filled in the compute dtype and widened for reducing."""
        return float(self.workload.element_bytes * self.workload.bucket_elements)

    def buffer_bytes(self, moment: str) -> float:
        """Two buckets in the backward pass: one fills while the other is sent."""
        return 2 * self.bucket_bytes if moment == "backward" else 0.0

    def first_backward_buffers(self) -> float:
        """Buckets are allocated after the loss has computed the first gradient."""
        return 0.0

    @property
    def gradient_bytes(self) -> float:
        """Each backward pass makes a partition and adds it to the one kept."""
        return self.partition_bytes if self.workload.accumulation > 1 else 0.0

    def gather_points(self) -> Iterator[GatherPoint]:
        """The points of a replicated engine, and the one at which the first bucket is full."""
        yield from super().gather_points()
        if self._fills_a_bucket:
            depth = 1 - self.workload.bucket_elements / self.workload.trainable
            yield GatherPoint("backward", depth, 0.0)

    def gradients_at(self, point: GatherPoint) -> float:
        """The partition exists once a bucket was full."""
        new = self.partition_bytes if point.phase == "backward" and point.depth < 1 else 0.0
        return self.gradient_bytes + new

    def gradients_at_embeddings(self) -> float:
        """The partition exists if a bucket was full before."""
        return self.gradient_bytes + (self.partition_bytes if self._fills_a_bucket else 0.0)

    def reduction_moments(self) -> Iterator[MemoryEstimate]:
        """The first full bucket is copied before the partition exists, the second after."""
        workload = self.workload
        elements = min(workload.trainable, workload.bucket_elements)
        widened = FLOAT32 * elements if workload.element_bytes < FLOAT32 else 0
        copy = float(FLOAT32 * elements / workload.ranks + widened)
        yield self.at("backward", activations=self.saved * (1 - self.first_bucket), working=copy)
        yield self.at(
            "backward",
            activations=max(0.0, self.saved * (1 - 2 * self.first_bucket)),
            working=copy,
            gradients=self.gradient_bytes + self.partition_bytes,
        )

    def update_moments(self) -> Iterator[MemoryEstimate]:
        """The norm in float64, then all gradients of the rank end to end, in float32."""
        flat = FLOAT32 * self.workload.trainable / self.optimizer_ranks
        norm = FLOAT64 * min(self.largest_trained, flat / FLOAT32)
        yield self.at("update", working=max(norm, flat), gradients=self.partition_bytes)
        yield self.at("update", working=flat, gradients=0.0)

    def own_collectives(self) -> list[Collective]:
        """Gradients are reduced after every micro-batch; weights are gathered after the update."""
        workload = self.workload
        gradients = FLOAT32 * workload.trainable * workload.accumulation
        weights = workload.element_bytes * workload.trainable
        return [
            self.ring("gradients", workload.ranks, gradients, 2),
            self.ring("weights", workload.ranks, weights),
        ]


class Zero3Model(DeepSpeedModel):
    """DeepSpeed's ZeRO-3: each rank keeps a range of every parameter, and gathers it when used."""

    @cached_property
    def schedule(self) -> GatherSchedule:
        """What is gathered, and when."""
        return simulate_gathers(self.workload)

    def kept_elements(self, parameter: ParameterSpec) -> int:
        """Elements of the rank's range."""
        return parameter.element_share(self.workload.shard)

    @property
    def gradient_bytes(self) -> float:
        """Float32 gradients of the rank's range; in host memory with offload."""
        workload = self.workload
        return 0.0 if workload.offload else FLOAT32 * workload.trainable / workload.shard

    def buffer_bytes(self, moment: str) -> float:
        """One bucket at all times."""
        return self.bucket_bytes

    def always_gathered_bytes(self) -> float:
        """Parameters below the persistence threshold stay whole."""
        return float(self.workload.element_bytes * self.schedule.persistent)

    def gather_points(self) -> Iterator[GatherPoint]:
        """The peaks of the schedule."""
        for peak in self.schedule.peaks:
            is_first = peak.phase == FORWARD and not peak.depth
            if peak.phase != END:
                yield GatherPoint(
                    "first" if is_first else peak.phase,
                    peak.depth / self.workload.shape.layers,
                    float(self.workload.element_bytes * peak.elements),
                )

    def gathered_in_backward(self, depth: float) -> float:
        """The greatest peak of the backward pass at or below `depth`."""
        points = (x for x in self.gather_points() if x.phase == BACKWARD and x.depth <= depth)
        return max((x.gathered for x in points), default=self.gathered_outer_bytes())

    def gathered_outer_bytes(self) -> float:
        """The embeddings; the output matrix was freed before the layers."""
        if self.workload.shard == 1:
            return 0.0
        return self.workload.element_bytes * self.matrix_elements

    def reduction_moments(self) -> Iterator[MemoryEstimate]:
        """The first full bucket is copied and reduced."""
        workload, rest = self.workload, 1 - self.first_bucket
        if workload.offload:
            return
        copies = 1 if workload.on_gpu else 2  # gloo works on a copy
        elements = min(workload.trainable, workload.bucket_elements)
        yield self.at(
            "backward",
            gathered=self.gathered_in_backward(rest),
            activations=self.saved * rest,
            working=float(copies * FLOAT32 * elements),
        )

    def update_moments(self) -> Iterator[MemoryEstimate]:
        """The norm in float64, then the gradients of a sub-group end to end, in float32."""
        if self.workload.offload:
            yield self.at("update")
            return
        whole = FLOAT32 * self.workload.trainable / self.optimizer_ranks
        flat = min(whole, FLOAT32 * SUB_GROUP_ELEMENTS)
        norm = FLOAT64 * min(self.largest_trained / self.workload.shard, whole / FLOAT32)
        yield self.at("update", working=max(norm, flat))
        yield self.at("update", working=flat)

    def own_collectives(self) -> list[Collective]:
        """The schedule's gathers in each micro-batch; persistent parameters once a step."""
        workload, schedule = self.workload, self.schedule
        # A pass without a gradient gathers every parameter once.
        once = workload.shape.parameters - schedule.persistent
        received = schedule.received + workload.extra_runs * once
        elements = received * workload.accumulation + schedule.persistent
        gradients = FLOAT32 * workload.trainable * workload.accumulation
        return [
            self.ring("weights", workload.ranks, workload.element_bytes * elements),
            self.ring("gradients", workload.ranks, gradients),
        ]


def _trained_rows(parameters: Sequence[ParameterSpec], shard: int) -> int:
    """Elements of a rank's rows of the parameters that train."""
    return sum(x.row_share(shard) for x in parameters if x.trains)


@lru_cache(maxsize=256)
def _fullest_partition(sizes: tuple[int, ...], ranks: int) -> int:
    """The most elements of whole parameters that one of `ranks` equal ranges touches."""
    total, end, touched = sum(sizes), 0, [0] * ranks
    for size in sizes:
        start, end = end, end + size
        for rank in range(start * ranks // total, (end - 1) * ranks // total + 1):
            touched[rank] += size
    return max(touched)


def build_engine_model(workload: Workload, profile: TrainerProfile = DTRAIN) -> EngineModel:
    """The memory model that the table of engines names for the workload's engine."""
    model: EngineModel = import_object(ENGINES[workload.engine].memory_model)(workload, profile)
    return model
