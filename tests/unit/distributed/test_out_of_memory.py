"""Errors of all libraries that report exhausted memory are recognized, and no others."""

from __future__ import annotations

import errno

import pytest
import torch

from dtrain.distributed.out_of_memory import is_out_of_memory, memory_error


def test_allocator_errors_are_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError(
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"
        ),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("cuMemCreate failed with CUDA_ERROR_OUT_OF_MEMORY"),
        torch.distributed.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error, NCCL version 2.27.5\n"
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
            "Cuda failure 2 'out of memory'"
        ),
        torch.distributed.DistBackendError("Last error:\nFailed to CUDA calloc 6291456 bytes"),
        torch.distributed.DistBackendError("Last error:\nFailed to CUDA host alloc 1024 bytes"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Error out of memory at line 123 in file /src/csrc/ops.cu"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("failed to allocate 17179869184 bytes of pinned memory"),
        RuntimeError("mmap: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:50],
)
def test_library_messages_are_recognized_also_as_a_cause(error: BaseException) -> None:
    assert is_out_of_memory(error)
    later = RuntimeError("the backward pass failed")
    later.__cause__ = error
    assert is_out_of_memory(later)
    assert is_out_of_memory(ExceptionGroup("two threads", [RuntimeError("other"), later]))
    assert memory_error(later) is error  # which the message quotes


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),  # without a full GPU
        RuntimeError("CUDA error: too many resources requested for launch"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or network error"),
        ValueError("no template for: I ran out of memory"),
        KeyError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: str(error)[:50],
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_error_after_a_handled_out_of_memory_error_is_not_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("not this") from None
    assert not is_out_of_memory(caught.value)


def test_workspace_error_on_a_full_gpu_is_out_of_memory(monkeypatch) -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 << 20, 80 << 30))
    assert is_out_of_memory(error)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 << 30, 80 << 30))
    assert not is_out_of_memory(error)
