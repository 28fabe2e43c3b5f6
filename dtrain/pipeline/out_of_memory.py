"""The out-of-memory message: current usage, the plan's estimate, and settings that would fit."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress

import torch

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.units import size
from dtrain.distributed.memory import peak_memory_bytes
from dtrain.pipeline.auto_settings import gpu_of, simplest
from dtrain.planning.fit import suggest_reductions
from dtrain.planning.plan import StagePlan, make_plan
from dtrain.planning.workload import Cluster

# What libraries say when an allocation outside torch's GPU allocator fails; most often in a bare
# RuntimeError.
WORDS = (
    # Drivers of CUDA and HIP; NCCL ("Cuda failure 2 'out of memory'"), bitsandbytes, Triton.
    r"\bout of memory\b",
    r"\bcudaErrorMemoryAllocation\b|\bhipErrorOutOfMemory\b",
    # cuBLAS, cuDNN ("…_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), and others of their kind.
    r"\b[A-Z]+_(STATUS|ERROR)_\w*(ALLOC|ALLOCATION)_FAILED\b|\bCUDA_ERROR_OUT_OF_MEMORY\b",
    r"\bFailed to (CUDA |HIP )?(host )?[cm]?alloc\b",  # NCCL, of a GPU or of the host
    # Host memory: torch's two wordings, C++, the kernel's ENOMEM, numpy.
    r"\bDefaultCPUAllocator: |\bnot enough memory: you tried to allocate\b",
    r"\bstd::bad_alloc\b|\bcannot allocate memory\b|\bunable to allocate [\d.]+ \w*B\b",
    # Pinned memory, for offloading and for saves.
    r"\b(unable|failed) to (allocate|pin|lock|register)\b.{0,80}\bmemory\b",
)
_WORDS = re.compile("|".join(WORDS), re.IGNORECASE)
# A kernel that wants more shared memory or registers than the GPU has: a defect, not a size.
_OF_A_KERNEL = re.compile(r"\bout of resources?\b", re.IGNORECASE)
# What cuBLAS and cuDNN say, among others, when their own workspace finds no room.
_MAY_BE = re.compile(r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)")
LEAST_FREE_BYTES = 512 << 20
ALWAYS = (
    "train.micro_batch_size=1, model.gradient_checkpointing=true, "
    "a shorter data.sequence_length, method.kind=qlora, or engine={kind: fsdp2, shard: node}"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the host, in this error or in what caused it."""
    return _memory_error(error) is not None


def _memory_error(error: BaseException) -> BaseException | None:
    """The first error that says so: this one, its causes, or those of a group."""
    waiting, seen = [error], set[int]()
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if _says_so(current):
            return current
        if isinstance(current, BaseExceptionGroup):
            waiting += current.exceptions
        before = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
        waiting += [before] if before is not None else []
    return None


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    from_library = type(error).__module__.partition(".")[0] not in ("builtins", "dtrain")
    if not (from_library or isinstance(error, RuntimeError | OSError)):
        return False  # a ValueError, say, that has the words from data
    text = str(error)
    if _MAY_BE.search(text) and _gpu_is_full():
        return True
    return bool(_WORDS.search(text)) and not _OF_A_KERNEL.search(text)


def _gpu_is_full() -> bool:
    """Whether the driver has no room left for a library's workspace."""
    if not torch.cuda.is_available():
        return False
    with suppress(RuntimeError):
        return torch.cuda.mem_get_info()[0] < LEAST_FREE_BYTES
    return False


def out_of_memory_text(error: BaseException, recipe: Recipe) -> str:
    """The message: it is the same at another try, so a job is not requeued for it."""
    first = _memory_error(error) or error
    said = str(first).strip().splitlines() or [type(first).__name__]  # Python's own says nothing
    fix = ALWAYS
    lines = [f"out of memory: {said[0]}"]
    with suppress(RuntimeError):  # of a GPU that answers nothing any more
        lines.append(f"    now: {now()}")
    with suppress(UserError, RuntimeError):  # UserError: the plan does not know the architecture
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
    stage = make_plan(recipe, cluster).largest
    suggestions = suggest_reductions(stage.workload, cluster)
    return stage, [f"{' '.join(x.settings)} ({x.cost})" for x in suggestions]


def terms(stage: StagePlan) -> str:
    """The plan's terms in a line."""
    texts = [f"{name} {size(value)}" for name, value in stage.memory.terms().items() if value]
    return f"{', '.join(texts)}; {size(stage.memory.peak)} of tensors at the peak"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
