"""What a teacher that is another model adds to the plan of a stage.

Every rank keeps its output matrix and embeddings; its decoder layers are shared among the ranks
where the engine shards the base. All amounts are of one rank.
"""

from __future__ import annotations

from dtrain.planning.workload import Workload


def is_sharded(workload: Workload) -> bool:
    """Whether ranks share the teacher's decoder layers."""
    return workload.capabilities.shards_base and workload.shard > 1


def kept_bytes(workload: Workload) -> float:
    """Bytes of the teacher's weights in every step."""
    return 0.0 if workload.stores_teacher else weight_bytes(workload)


def weight_bytes(workload: Workload) -> float:
    """Bytes of the teacher's weights, in the compute dtype; 0 without a teacher."""
    teacher = workload.teacher
    if teacher is None:
        return 0.0
    layers = teacher.decoder_parameters
    ranks = workload.shard if is_sharded(workload) else 1
    return workload.element_bytes * (layers / ranks + teacher.outer_parameters)


def gathered_bytes(workload: Workload) -> float:
    """Bytes while it computes: one layer, the next, and the buffer that it arrives in."""
    teacher = workload.teacher
    before = weight_bytes(workload) - kept_bytes(workload)
    if teacher is None or not is_sharded(workload):
        return before
    return before + 3.0 * workload.element_bytes * teacher.layer_parameters


def working_bytes(workload: Workload) -> float:
    """Bytes inside a layer's MLP, which saves nothing for a backward pass."""
    teacher = workload.teacher
    if teacher is None:
        return 0.0
    width = 2 * teacher.mlp + 4 * teacher.hidden
    return float(workload.element_bytes * width * workload.tokens)


def sent_bytes(workload: Workload) -> float:
    """Bytes of all layers, gathered once in each micro-batch of an optimizer step."""
    teacher = workload.teacher
    if teacher is None or workload.stores_teacher or not is_sharded(workload):
        return 0.0
    layers = teacher.decoder_parameters
    return float(workload.element_bytes * layers * workload.accumulation)


def flops_per_token(workload: Workload) -> float:
    """Operations of the teacher's forward pass for one token of a step."""
    teacher = workload.teacher
    if teacher is None or workload.stores_teacher:
        return 0.0
    matrices = teacher.active_linear_elements + teacher.vocabulary * teacher.hidden
    return 2.0 * (matrices + workload.sequence_length * teacher.attention_width)
