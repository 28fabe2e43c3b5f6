"""How long a step takes: arithmetic, dequantisation and sending.

Letters: P parameters of the linear layers, n that train, q width of the queries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.communication import collectives_of
from dtrain.planning.constants import (
    DEQUANTIZE_BYTES,
    EXPOSED,
    SLOWEST_LINK,
    UTILIZATION,
    UTILIZATION_ELSEWHERE,
)
from dtrain.planning.gpus import Gpu
from dtrain.planning.workload import Cluster, Workload


@dataclass(frozen=True)
class Estimate:
    """A figure that is known so well only."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> Estimate:
        """All three, scaled."""
        return Estimate(self.low * factor, self.middle * factor, self.high * factor)


def flops_per_token(workload: Workload) -> float:
    """Arithmetic that a token costs, recomputation included.

    A matrix costs 2 a weight forward, 2 for the gradient of its input, and 2 for its own where it
    trains; attention 2 q a token it sees, half of a sequence on average, forward, and twice that
    backward.
    """
    shape, again = workload.shape, int(workload.checkpointing)
    passes = 2 + workload.is_full
    linear = 2 * (passes + again) * shape.linear_elements
    head = 2 * passes * shape.vocabulary * shape.hidden
    attention = 2 * shape.q * workload.sequence_length * shape.layers * (3 + again)
    adapters = 0 if workload.is_full else 2 * (3 + again) * workload.trainable
    return float(linear + head + attention + adapters)


def utilization(gpu: Gpu) -> Estimate:
    """Share of the GPU's arithmetic that training reaches."""
    family = gpu.name.split("-")[0]
    return Estimate(*UTILIZATION.get(family, UTILIZATION_ELSEWHERE))


def has_published_speed(gpu: Gpu) -> bool:
    """Whether speeds of this kind of GPU were among the published figures."""
    return gpu.name.split("-")[0] in UTILIZATION


def step_seconds(workload: Workload, cluster: Cluster) -> Estimate:
    """One optimizer step, from the fastest to the slowest that is likely.

    Slowest: nothing overlaps, and links reach the least that was published.
    """
    share, work = utilization(cluster.gpu), _full_rate_seconds(workload, cluster)
    extra = dequantize_seconds(workload, cluster.gpu) * workload.accumulation
    send = communication_seconds(workload, cluster)
    fast = max(work / share.high + extra / 2, send)
    likely = _overlapped(work / share.middle + extra, send)
    slow = work / share.low + 1.5 * extra + send / SLOWEST_LINK
    return Estimate(fast, likely, slow)


def is_communication_bound(workload: Workload, cluster: Cluster) -> bool:
    """Whether sending is likely to take longer than computing."""
    work = _full_rate_seconds(workload, cluster) / utilization(cluster.gpu).middle
    extra = dequantize_seconds(workload, cluster.gpu) * workload.accumulation
    return communication_seconds(workload, cluster) > work + extra


def _full_rate_seconds(workload: Workload, cluster: Cluster) -> float:
    """Arithmetic of one optimizer step at the rate of the data sheet."""
    flops = flops_per_token(workload) * workload.tokens * workload.accumulation
    wider = 2 if workload.element_bytes == 4 else 1  # TF32 at best
    return wider * flops / (cluster.gpu.tflops * 1e12)


def _overlapped(compute: float, send: float) -> float:
    return max(compute, send) + EXPOSED * min(compute, send)


def dequantize_seconds(workload: Workload, gpu: Gpu) -> float:
    """Of one micro-batch: every NF4 layer forward, backward, and where it is computed again."""
    if workload.method != "qlora":
        return 0.0
    passes = 2 + workload.checkpointing
    bandwidth = gpu.memory_gb_s * 1e9
    return passes * DEQUANTIZE_BYTES * workload.shape.linear_elements / bandwidth


def communication_seconds(workload: Workload, cluster: Cluster) -> float:
    """Of one optimizer step, if nothing else were done."""
    gpu, total = cluster.gpu, 0.0
    for one in collectives_of(workload):
        inside = 0.0 if one.crosses and one.name == "gradients of groups" else one.received
        network = gpu.network_gb_s * 1e9 * cluster.gpus_per_node
        total += max(inside / (gpu.link_gb_s * 1e9), one.entering / network)
    if workload.offload:  # parameters to the GPU twice and gradients back, over PCIe
        moved = 3 * workload.element_bytes * workload.shape.parameters * workload.accumulation
        total += moved / workload.ranks / 12e9
    return total


def tokens_per_second(workload: Workload, cluster: Cluster) -> Estimate:
    """Of all ranks together."""
    seconds = step_seconds(workload, cluster)
    tokens = workload.step_tokens
    return Estimate(tokens / seconds.high, tokens / seconds.middle, tokens / seconds.low)
