"""Whether an error says that GPU or host memory ran out, whatever library raised it."""

from __future__ import annotations

import errno
import re
from contextlib import suppress

import torch

# Messages of libraries when an allocation outside torch's GPU allocator fails, most often in a
# plain RuntimeError.
PATTERNS = (
    # Drivers of CUDA and HIP; NCCL ("Cuda failure 2 'out of memory'"), bitsandbytes, Triton.
    r"\bout of memory\b",
    r"\bcudaErrorMemoryAllocation\b|\bhipErrorOutOfMemory\b",
    # cuBLAS, cuDNN ("…_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED") and similar libraries.
    r"\b[A-Z]+_(STATUS|ERROR)_\w*(ALLOC|ALLOCATION)_FAILED\b|\bCUDA_ERROR_OUT_OF_MEMORY\b",
    r"\bFailed to (CUDA |HIP )?(host )?[cm]?alloc\b",  # NCCL, for GPU or host memory
    # Host memory: two messages of torch, C++, the kernel's ENOMEM, numpy.
    r"\bDefaultCPUAllocator: |\bnot enough memory: you tried to allocate\b",
    r"\bstd::bad_alloc\b|\bcannot allocate memory\b|\bunable to allocate [\d.]+ \w*B\b",
    # Pinned memory, for offloading and for saves.
    r"\b(unable|failed) to (allocate|pin|lock|register)\b.{0,80}\bmemory\b",
)
_PATTERN = re.compile("|".join(PATTERNS), re.IGNORECASE)
# A kernel that needs more shared memory or registers than the GPU has: a bug, not a setting.
_KERNEL_RESOURCES = re.compile(r"\bout of resources?\b", re.IGNORECASE)
# Messages of cuBLAS and cuDNN, among others, when there is no memory for their workspace.
_WORKSPACE_ERROR = re.compile(
    r"CUBLAS_STATUS_NOT_INITIALIZED|CUDNN_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)"
)
MIN_FREE_BYTES = 512 << 20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or host memory ran out, according to this error or its causes."""
    return memory_error(error) is not None


def memory_error(error: BaseException) -> BaseException | None:
    """The first error that reports it: this one, its causes, or those of a group."""
    queue, seen = [error], set[int]()
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        if _reports_out_of_memory(current):
            return current
        if isinstance(current, BaseExceptionGroup):
            queue += current.exceptions
        before = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
        queue += [before] if before is not None else []
    return None


def _reports_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    from_library = type(error).__module__.partition(".")[0] not in ("builtins", "dtrain")
    if not (from_library or isinstance(error, RuntimeError | OSError)):
        return False  # for example a ValueError that quotes a row of the data
    text = str(error)
    if _WORKSPACE_ERROR.search(text) and _gpu_is_full():
        return True
    return bool(_PATTERN.search(text)) and not _KERNEL_RESOURCES.search(text)


def _gpu_is_full() -> bool:
    """Whether too little GPU memory is free for a library's workspace."""
    if not torch.cuda.is_available():
        return False
    with suppress(RuntimeError):
        return torch.cuda.mem_get_info()[0] < MIN_FREE_BYTES
    return False
