"""The message of a run that ran out of memory: current usage, the plan, and what to change."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError, first_line
from dtrain.core.process_limits import address_limit
from dtrain.core.units import size
from dtrain.distributed.out_of_memory import memory_error
from dtrain.distributed.tensor_utils import peak_memory_bytes
from dtrain.pipeline.auto_settings import gpu_of, simplest
from dtrain.planning.fit import suggest_reductions
from dtrain.planning.plan import StagePlan, make_plan
from dtrain.planning.workload import Cluster

GENERAL_ADVICE = (
    "train.micro_batch_size=1, model.gradient_checkpointing=true, "
    "a shorter data.sequence_length, method.kind=qlora, or engine={kind: fsdp2, shard: node}"
)


def out_of_memory_text(error: BaseException, recipe: Recipe) -> str:
    """The message for the terminal: the error, current usage, the plan, and what to change."""
    first = memory_error(error) or error
    fix = GENERAL_ADVICE
    lines = [f"out of memory: {first_line(first)}"]
    with suppress(RuntimeError):  # the GPU may no longer respond
        lines.append(f"    now: {memory_usage()}")
    if (limit := address_limit()) is not None:
        lines.append(f"    ulimit -v lets a process reserve {size(limit)}")
    # UserError: the plan does not know the architecture.
    with suppress(UserError, RuntimeError, MemoryError):
        stage, changes = plan_reductions(recipe)
        lines.append(f"    plan, stage {stage.name}: {format_terms(stage)}")
        fix = "; or ".join(changes) or GENERAL_ADVICE
    return "\n".join([*lines, f"    → {fix}"])


def memory_usage() -> str:
    """Memory that this rank uses now, and its peak."""
    device = _device()
    peak = f"peak of this rank {size(peak_memory_bytes(device))}"
    if device.type != "cuda":
        return peak
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"{size(allocated)} in tensors, {size(reserved)} reserved by the allocator, {peak}, "
        f"{size(free)} free of {size(total)}"
    )


def plan_reductions(recipe: Recipe) -> tuple[StagePlan, list[str]]:
    """The plan of the stage that needs the most memory, and the cheapest ways to reduce it.

    Raises:
        UserError: the plan does not know the base model.
    """
    device = _device()
    if device.type != "cuda":
        recipe = simplest(recipe)  # as the run resolved it
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    cluster = Cluster(gpu_of(device), max(1, ranks // on_node), on_node)
    stage = make_plan(recipe, cluster).largest
    suggestions = suggest_reductions(stage.workload, cluster)
    return stage, [f"{x.arguments(stage.name)} ({x.cost})" for x in suggestions]


def format_terms(stage: StagePlan) -> str:
    """The terms of a memory plan on one line."""
    texts = [f"{name} {size(value)}" for name, value in stage.memory.terms().items() if value]
    return f"{', '.join(texts)}; {size(stage.memory.peak)} of tensors at the peak"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
