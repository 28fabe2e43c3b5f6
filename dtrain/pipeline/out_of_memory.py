"""Out of memory: the numbers of that moment, the plan's beside them, and what would fit."""

from __future__ import annotations

import os
from contextlib import suppress

import torch

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.units import size
from dtrain.distributed.memory import peak_memory_bytes
from dtrain.pipeline.planned import gpu_of, simplest
from dtrain.planning.plan import StagePlan, make_plan
from dtrain.planning.setup import Cluster
from dtrain.planning.verdict import reductions

# Words of torch's CPU allocator, which raises a bare RuntimeError.
CPU_WORDS = ("DefaultCPUAllocator", "not enough memory: you tried to allocate")
ALWAYS = (
    "train.micro_batch_sequences=1, model.gradient_checkpointing=true, "
    "a shorter data.sequence_tokens, method.kind=qlora, or engine={kind: fsdp2, shard: node}"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in CPU_WORDS)


def out_of_memory_text(error: BaseException, recipe: Recipe) -> str:
    """What to tell: it is the same at another try, so a job is not requeued for it."""
    said = str(error).strip().splitlines() or [type(error).__name__]  # Python's own says nothing
    lines = [f"out of memory: {said[0]}", f"    now: {now()}"]
    fix = ALWAYS
    with suppress(UserError):  # an architecture that the plan does not know
        stage, ways = planned(recipe)
        lines.append(f"    plan, stage {stage.name}: {terms(stage)}")
        fix = "; or ".join(ways) or ALWAYS
    return "\n".join([*lines, f"    → {fix}"])


def now() -> str:
    """Memory at this moment, of this rank."""
    device = _device()
    peak = f"peak of this rank {size(peak_memory_bytes(device))}"
    if device.type != "cuda":
        return peak
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return (
        f"{size(held[0])} in tensors, {size(held[1])} held by the allocator, {peak}, "
        f"{size(free)} free of {size(total)}"
    )


def planned(recipe: Recipe) -> tuple[StagePlan, list[str]]:
    """The plan of the stage that needs most, and the cheapest ways to less.

    Raises:
        UserError: the plan does not know the base.
    """
    device = _device()
    if device.type != "cuda":
        recipe = simplest(recipe)  # as the run itself has it
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks)))
    cluster = Cluster(gpu_of(device), max(1, ranks // on_node), on_node)
    stage = make_plan(recipe, cluster).worst
    changes = reductions(stage.setup, cluster)
    return stage, [f"{' '.join(x.texts)} ({x.cost})" for x in changes]


def terms(stage: StagePlan) -> str:
    """The plan's terms in a line."""
    parts = [f"{name} {size(value)}" for name, value in stage.memory.terms().items() if value]
    return f"{', '.join(parts)}; {size(stage.memory.peak)} of tensors at the peak"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
