"""How long an optimizer step takes: arithmetic, dequantization and communication.

The constants are measured; `tests/bench/plan_points.py FOLDER` fits them to published figures,
leaving out one source at a time, and tests/bench/LOG.md lists the errors.

Letters: n parameters that train, q width of the queries, V vocabulary, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning import teacher
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import Gpu
from dtrain.planning.shapes import ModelShape
from dtrain.planning.workload import Cluster, Workload

# Fraction of the data sheet's arithmetic that a training step reaches: lowest published, median,
# and highest sixth, from NVIDIA, MosaicML, torchtune, Qwen and Answer.AI (34 rows).
UTILIZATION = {
    "a100": (0.39, 0.56, 0.64),
    "h100": (0.33, 0.44, 0.52),
    "rtx4090": (0.55, 0.66, 0.86),
    "rtx3090": (0.51, 0.60, 0.68),
}
OTHER_UTILIZATION = (0.33, 0.56, 0.70)
# What mixtures of experts, whose products are small, reach of these three: fitted to 7 rows of NeMo
# AutoModel and prime-rl (tests/unit/planning/mixture_points.csv), so these rows do not confirm it.
EXPERTS_REACH = (0.70, 0.67, 1.0)

# Bytes of memory traffic that dequantizing one element from NF4 to 16 bits costs in each pass.
DEQUANTIZE_BYTES = 8.0
# Fraction of a link's bandwidth in the slowest published case: two RTX 3090 on an older board, 7B
# in 16 bits sharded between them, 3.4 of 12 GB/s (AnswerDotAI/fsdp_qlora, benchmarks, March 2024).
SLOWEST_LINK = 0.3
# Fraction of the shorter of computing and sending that does not overlap with the longer.
EXPOSED = 0.2
PCIE_BYTES_PER_SECOND = 12e9


@dataclass(frozen=True)
class Estimate:
    """A figure with the range that it is known to."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> Estimate:
        """The estimate with all three figures scaled."""
        return Estimate(self.low * factor, self.middle * factor, self.high * factor)

    def plus(self, term: float | Estimate) -> Estimate:
        """The sum with a figure that is known, or with another estimate."""
        other = term if isinstance(term, Estimate) else Estimate(term, term, term)
        return Estimate(self.low + other.low, self.middle + other.middle, self.high + other.high)


def flops_per_token(workload: Workload) -> float:
    """Floating-point operations for one token, including recomputation.

    Each weight of a matrix costs 2 in the forward pass, 2 for the gradient of the input, and 2 for
    its own gradient if it trains. The backward pass ends at the lowest layer that trains. Attention
    costs 2 q for each token that a token attends to, half of a sequence on average, in the forward
    pass, and twice that in the backward pass. The adapter takes no part in the extra forward passes
    of a reference.
    """
    shape, reached = workload.shape, workload.backward_share
    recomputed = reached * workload.checkpointing
    forwards = 1 + recomputed + workload.extra_forwards
    linear = 2 * (forwards + reached) * shape.active_linear_elements
    linear += 2 * workload.trained_active_elements
    head_passes = 2 + workload.method.trains_outer + workload.extra_forwards
    head = 2 * head_passes * shape.vocabulary * shape.hidden
    attention_passes = forwards + 2 * reached
    attention = 2 * shape.attention_width * workload.sequence_length * attention_passes
    adapters = 2 * (3 + recomputed) * workload.adapter_products
    return float(linear + head + attention + adapters + teacher.flops_per_token(workload))


def utilization(gpu: Gpu, shape: ModelShape) -> Estimate:
    """Fraction of the GPU's arithmetic that training reaches."""
    shares = UTILIZATION.get(gpu.family, OTHER_UTILIZATION)
    reach = EXPERTS_REACH if shape.experts else (1.0, 1.0, 1.0)
    return Estimate(*(share * part for share, part in zip(shares, reach, strict=True)))


def has_published_speed(gpu: Gpu) -> bool:
    """Whether the published figures include this family of GPUs."""
    return gpu.family in UTILIZATION


def step_seconds(workload: Workload, cluster: Cluster) -> Estimate:
    """Seconds of one optimizer step.

    In the slowest case nothing overlaps, and links reach the lowest published bandwidth.
    """
    fraction = utilization(cluster.gpu, workload.shape)
    compute = _data_sheet_seconds(workload, cluster)
    dequantize = dequantize_seconds(workload, cluster.gpu) * workload.accumulation
    send = communication_seconds(workload, cluster)
    work = compute / fraction.middle + dequantize
    return Estimate(
        low=max(compute / fraction.high + dequantize / 2, send),
        middle=max(work, send) + EXPOSED * min(work, send),
        high=compute / fraction.low + 1.5 * dequantize + send / SLOWEST_LINK,
    )


def is_communication_bound(workload: Workload, cluster: Cluster) -> bool:
    """Whether sending is likely to take longer than computing."""
    fraction = utilization(cluster.gpu, workload.shape).middle
    compute = _data_sheet_seconds(workload, cluster) / fraction
    dequantize = dequantize_seconds(workload, cluster.gpu) * workload.accumulation
    return communication_seconds(workload, cluster) > compute + dequantize


def _data_sheet_seconds(workload: Workload, cluster: Cluster) -> float:
    """Seconds of one optimizer step's arithmetic at the rate of the data sheet."""
    flops = flops_per_token(workload) * workload.tokens * workload.accumulation
    slowdown = 2 if workload.element_bytes == 4 else 1  # TF32 at best
    return slowdown * flops / (cluster.gpu.tflops * 1e12)


def dequantize_seconds(workload: Workload, gpu: Gpu) -> float:
    """Seconds a micro-batch that dequantizing takes: forward, backward, and in recomputation."""
    if not workload.traits.quantizes_base:
        return 0.0
    passes = 2 + workload.checkpointing + workload.extra_forwards
    bandwidth = gpu.memory_gb_s * 1e9
    return passes * DEQUANTIZE_BYTES * workload.shape.packed_elements / bandwidth


def communication_seconds(workload: Workload, cluster: Cluster) -> float:
    """Seconds that one optimizer step's communication takes if nothing else runs."""
    gpu, total = cluster.gpu, 0.0
    network = gpu.network_gb_s * 1e9 * cluster.gpus_per_node
    for collective in build_engine_model(workload).collectives():
        skips_links = collective.crosses and collective.between_nodes
        inside = 0.0 if skips_links else collective.received
        total += max(inside / (gpu.link_gb_s * 1e9), collective.entering / network)
    if workload.offload:  # parameters to the GPU twice, and gradients back
        elements = workload.shape.parameters * workload.accumulation
        moved = 3 * workload.element_bytes * elements
        total += moved / workload.ranks / PCIE_BYTES_PER_SECOND
    return total


def tokens_per_second(workload: Workload, cluster: Cluster) -> Estimate:
    """Tokens a second of all ranks together."""
    seconds, tokens = step_seconds(workload, cluster), workload.step_tokens
    return Estimate(tokens / seconds.high, tokens / seconds.middle, tokens / seconds.low)
