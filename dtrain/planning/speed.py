"""How long a step takes: arithmetic, dequantisation and sending.

Letters: P parameters of the linear layers, n that train, q width of the queries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.communication import collectives_of
from dtrain.planning.constants import (
    DEQUANTISE_BYTES,
    EXPOSED,
    SLOWEST_LINK,
    UTILISATION,
    UTILISATION_ELSEWHERE,
)
from dtrain.planning.gpus import Gpu
from dtrain.planning.workload import Cluster, Setup


@dataclass(frozen=True)
class Range:
    """A figure that is known so well only."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> Range:
        """All three, scaled."""
        return Range(self.low * factor, self.middle * factor, self.high * factor)


def flops_per_token(setup: Setup) -> float:
    """Arithmetic that a token costs, recomputation included.

    A matrix costs 2 a weight forward, 2 for the gradient of its input, and 2 for its own where it
    trains; attention 2 q a token it sees, half of a sequence on average, forward, and twice that
    backward.
    """
    shape, again = setup.shape, int(setup.checkpointing)
    passes = 2 + setup.is_full
    linear = 2 * (passes + again) * shape.linear_elements
    head = 2 * passes * shape.vocabulary * shape.hidden
    attention = 2 * shape.q * setup.sequence_length * shape.layers * (3 + again)
    adapters = 0 if setup.is_full else 2 * (3 + again) * setup.trainable
    return float(linear + head + attention + adapters)


def utilisation(gpu: Gpu) -> Range:
    """Share of the GPU's arithmetic that training reaches."""
    family = gpu.name.split("-")[0]
    return Range(*UTILISATION.get(family, UTILISATION_ELSEWHERE))


def is_measured(gpu: Gpu) -> bool:
    """Whether speeds of this kind of GPU were among the published figures."""
    return gpu.name.split("-")[0] in UTILISATION


def step_seconds(setup: Setup, cluster: Cluster) -> Range:
    """One optimizer step, from the fastest to the slowest that is likely.

    Slowest: nothing overlaps, and links reach the least that was published.
    """
    share, work = utilisation(cluster.gpu), _full_rate_seconds(setup, cluster)
    extra = dequantise_seconds(setup, cluster.gpu) * setup.accumulation
    send = sending_seconds(setup, cluster)
    fast = max(work / share.high + extra / 2, send)
    likely = _overlapped(work / share.middle + extra, send)
    slow = work / share.low + 1.5 * extra + send / SLOWEST_LINK
    return Range(fast, likely, slow)


def waits_for_links(setup: Setup, cluster: Cluster) -> bool:
    """Whether sending is likely to take longer than computing."""
    work = _full_rate_seconds(setup, cluster) / utilisation(cluster.gpu).middle
    extra = dequantise_seconds(setup, cluster.gpu) * setup.accumulation
    return sending_seconds(setup, cluster) > work + extra


def _full_rate_seconds(setup: Setup, cluster: Cluster) -> float:
    """Arithmetic of one optimizer step at the rate of the data sheet."""
    flops = flops_per_token(setup) * setup.tokens * setup.accumulation
    wider = 2 if setup.element_bytes == 4 else 1  # TF32 at best
    return wider * flops / (cluster.gpu.tflops * 1e12)


def _overlapped(compute: float, send: float) -> float:
    return max(compute, send) + EXPOSED * min(compute, send)


def dequantise_seconds(setup: Setup, gpu: Gpu) -> float:
    """Of one micro-batch: every NF4 layer forward, backward, and where it is computed again."""
    if setup.method != "qlora":
        return 0.0
    passes = 2 + setup.checkpointing
    bandwidth = gpu.memory_gb_s * 1e9
    return passes * DEQUANTISE_BYTES * setup.shape.linear_elements / bandwidth


def sending_seconds(setup: Setup, cluster: Cluster) -> float:
    """Of one optimizer step, if nothing else were done."""
    gpu, total = cluster.gpu, 0.0
    for one in collectives_of(setup):
        inside = 0.0 if one.crosses and one.name == "gradients of groups" else one.received
        network = gpu.network_gb_s * 1e9 * cluster.gpus_per_node
        total += max(inside / (gpu.link_gb_s * 1e9), one.entering / network)
    if setup.offload:  # parameters to the GPU twice and gradients back, over PCIe
        moved = 3 * setup.element_bytes * setup.shape.parameters * setup.accumulation
        total += moved / setup.ranks / 12e9
    return total


def tokens_per_second(setup: Setup, cluster: Cluster) -> Range:
    """Of all ranks together."""
    seconds = step_seconds(setup, cluster)
    tokens = setup.step_tokens
    return Range(tokens / seconds.high, tokens / seconds.middle, tokens / seconds.low)
