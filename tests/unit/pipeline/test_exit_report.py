"""Out-of-memory errors are recognized, reported once with the planned memory, and not retried."""

from __future__ import annotations

import errno
import json
import os
import time

import pytest
import torch

from dtrain import rank_main, train
from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.run_dir import RunDir
from dtrain.launching.requeue_policy import PERMANENT_FAILURES
from dtrain.pipeline.exit_report import ExitReport, is_out_of_memory, out_of_memory_text
from dtrain.training.callbacks import RunFolderWatch


def allocator_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


def test_allocator_errors_are_recognized() -> None:
    assert is_out_of_memory(allocator_error())
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
    text = out_of_memory_text(later, load_recipe("7b-lora", []))
    assert text.startswith(f"out of memory: {str(error).splitlines()[0]}")


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


def test_message_has_the_planned_memory_and_suggestions() -> None:
    recipe = load_recipe("7b-lora", ["stages.task.train.micro_batch_size=16"])
    text = out_of_memory_text(allocator_error(), recipe)
    assert text.startswith("out of memory: ") and "tried to allocate" in text
    assert "now: peak of this rank" in text
    assert "plan, stage task: weights 1" in text and "tensors at the peak" in text
    assert "train.micro_batch_size=" in text.rpartition("→")[2]


def test_unknown_base_gets_general_advice(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of-no-library"}')
    recipe = load_recipe("7b-lora", [f"model.base={tmp_path}"])
    text = out_of_memory_text(MemoryError("no more"), recipe)
    assert "plan" not in text and "gradient_checkpointing=true" in text


def test_error_without_a_message_is_reported_by_its_type() -> None:
    text = out_of_memory_text(MemoryError(), load_recipe("7b-lora", []))
    assert text.startswith("out of memory: MemoryError\n")


def test_run_exits_with_the_out_of_memory_status(tmp_path, monkeypatch, capsys) -> None:
    error = allocator_error()

    def out_of_memory(*_: object) -> None:
        raise error

    monkeypatch.setattr(rank_main, "start_world", out_of_memory)
    run = tmp_path / "run"
    assert train.main(["tiny", f"output.folder={run}"]) == Exit.OUT_OF_MEMORY
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["status"] == Exit.OUT_OF_MEMORY and "→" in outcome["reason"]
    assert "error: out of memory" in capsys.readouterr().err
    assert Exit.OUT_OF_MEMORY in PERMANENT_FAILURES  # a job is not requeued for it


def report_of(monkeypatch, run: RunDir, rank: int, start: str) -> ExitReport:
    """The exit report of a rank of a start."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", start)
    report = ExitReport()
    report.open(run)
    return report


@pytest.mark.parametrize("clock", [-3600.0, 0.0, 3600.0])
def test_first_failure_counts_whatever_the_clocks_say(monkeypatch, tmp_path, clock: float) -> None:
    """The file server's clock differs from this node's."""
    run, now = RunDir(tmp_path), time.time()
    second = report_of(monkeypatch, run, 1, "a")
    first = report_of(monkeypatch, run, 0, "a")
    assert second.failure_elsewhere() is None
    first.fail(Exit.NON_FINITE, "error: the loss")
    monkeypatch.setenv("RANK", "1")
    os.utime(run.exit_report, (now + clock, now + clock))
    assert second.failure_elsewhere() == (0, Exit.NON_FINITE)
    assert second.fail(Exit.CRASHED, "lost the connection") == Exit.NON_FINITE
    assert run.read_exit_report()["reason"] == "the loss"


def test_failure_of_another_start_is_ignored(monkeypatch, tmp_path) -> None:
    run = RunDir(tmp_path)
    report_of(monkeypatch, run, 0, "a").fail(Exit.NON_FINITE, "error: the loss")
    later = report_of(monkeypatch, run, 1, "b")  # before the first rank has removed the old one
    assert later.failure_elsewhere() is None
    assert later.fail(Exit.CRASHED, "a bug") == Exit.CRASHED


@pytest.mark.parametrize("how", ["moved", "deleted", "made again"])
def test_run_whose_folder_is_not_in_its_place_ends_as_failed(
    monkeypatch, tmp_path, capsys, how: str
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    report = report_of(monkeypatch, run, 0, "a")
    report.watch_folder()
    watch = RunFolderWatch(run.path)
    watch.post_step(None)
    assert report.moved_folder() is None
    run.path.rename(tmp_path / "elsewhere")
    if how != "moved":
        (tmp_path / "elsewhere").rmdir()
    if how == "made again":
        run.path.mkdir()
    with pytest.raises(UserError, match=f"{run.path}: .*moved"):
        watch.post_step(None)
    moved = report.moved_folder()
    assert moved is not None
    assert report.fail(moved.status, f"error: {moved}") == Exit.USER_ERROR
    assert "moved" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))  # nothing is created where the folder was
