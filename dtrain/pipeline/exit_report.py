"""How a start ended, for the supervisor and the other ranks; advice for out-of-memory errors.

A rank that fails breaks the connections of the others, whose errors are then noise. So it writes
its exit report first, and the others exit with its status and print nothing.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch

from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError, first_line
from dtrain.core.files import write_json
from dtrain.core.log import is_first_rank, say
from dtrain.core.output import wrapped
from dtrain.core.process_limits import address_limit
from dtrain.core.run_dir import FolderIdentity, RunDir, read_exit_report
from dtrain.core.units import size
from dtrain.distributed.tensor_utils import peak_memory_bytes
from dtrain.monitoring.starts import record_end, start_id
from dtrain.pipeline.auto_settings import gpu_of, simplest
from dtrain.planning.fit import suggest_reductions
from dtrain.planning.plan import StagePlan, make_plan
from dtrain.planning.workload import Cluster

OUTCOMES = {Exit.FINISHED: "finished", Exit.INTERRUPTED: "interrupted"}
WAIT_SECONDS = 2.0
POLL_SECONDS = 0.05
WRITE_TRIES = 5


class ExitReport:
    """The exit report of one rank; before `open` nothing is written: another run may own it."""

    def __init__(self) -> None:
        self._run: RunDir | None = None
        self._identity: FolderIdentity | None = None
        self._start = start_id(os.environ)
        self._lock = threading.Lock()  # the hang watchdog's thread also reports

    def open(self, run: RunDir) -> None:
        """Set the run folder."""
        self._run = run

    def watch_folder(self) -> None:
        """Remember which folder the run folder is, once the first rank has created it."""
        assert self._run is not None
        self._identity = FolderIdentity(self._run.path)

    def moved_folder(self) -> UserError | None:
        """The error if the run folder was moved or deleted; None if it is in its place."""
        try:
            if self._identity is not None:
                self._identity.check()
        except UserError as error:
            return error
        return None

    def end(self, status: Exit, reason: str = "") -> int:
        """Report an end without failure; return the exit status."""
        if is_first_rank():
            self._write(status, reason)
        return int(status)

    def fail(self, status: Exit, text: str, reason: str = "") -> int:
        """Report a failure, unless another rank's failure caused it; return the exit status.

        All ranks usually meet the same error at the same time; then the first rank reports it.

        Args:
            status: exit status of this rank.
            text: for the terminal.
            reason: for the file; by default the text.
        """
        cannot_tell = self._run is None or self.moved_folder() is not None
        if cannot_tell and os.environ.get("LOCAL_RANK", "0") != "0":
            return int(status)  # each machine prints it once
        has_crashed = status == Exit.CRASHED
        with self._lock:
            if has_crashed or not is_first_rank():
                first = self._await_failure(0 if has_crashed else WAIT_SECONDS)
                if first is not None:
                    return first
            self._write(status, (reason or text).removeprefix("error: "))
            print(wrapped(text, sys.stderr), file=sys.stderr, flush=True)
            say(f"ended with status {int(status)}")
        return int(status)

    def failure_elsewhere(self) -> tuple[int, int] | None:
        """Rank and exit status of the first failure of this start; None if there is none."""
        report = self._read_failure()
        return None if report is None else (int(report.get("rank", 0)), int(report["status"]))

    def _await_failure(self, seconds: float) -> int | None:
        """The status that another rank reports within `seconds`, or None."""
        deadline = time.monotonic() + seconds
        while (report := self._read_failure()) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return None if report is None else int(report["status"])

    def _read_failure(self) -> dict[str, Any] | None:
        """The failure that another rank reported; the report of an earlier start is ignored."""
        if self._run is None:
            return None
        for path in (self._run.refused, self._run.exit_report):
            with suppress(UserError, OSError, ValueError, KeyError):
                report = read_exit_report(path)
                is_failure = bool(report) and int(report["status"]) not in OUTCOMES
                if is_failure and report["start"] == self._start:
                    return report
        return None

    def _write(self, status: Exit, reason: str) -> None:
        if self._run is None or self.moved_folder() is not None:
            return
        outcome = OUTCOMES.get(status, "failed")
        report = {"outcome": outcome, "status": int(status), "reason": reason.strip()}
        report["start"] = self._start
        if outcome == "failed":
            report["rank"] = int(os.environ.get("RANK", "0"))
        for _ in range(WRITE_TRIES):  # other ranks write too, and the disk may be full for a moment
            with suppress(OSError):
                path = self._run.start_exit_report
                write_json(path, report)
                if path == self._run.exit_report and status != Exit.FINISHED:  # not refused
                    record_end(self._run, self._start, outcome, reason)
                return
            time.sleep(POLL_SECONDS)


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
GENERAL_ADVICE = (
    "train.micro_batch_size=1, model.gradient_checkpointing=true, "
    "a shorter data.sequence_length, method.kind=qlora, or engine={kind: fsdp2, shard: node}"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or host memory ran out, according to this error or its causes."""
    return _memory_error(error) is not None


def _memory_error(error: BaseException) -> BaseException | None:
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


def out_of_memory_text(error: BaseException, recipe: Recipe) -> str:
    """The message for the terminal: the error, current usage, the plan, and what to change."""
    first = _memory_error(error) or error
    fix = GENERAL_ADVICE
    lines = [f"out of memory: {first_line(first)}"]
    with suppress(RuntimeError):  # the GPU may no longer respond
        lines.append(f"    now: {memory_usage()}")
    if (limit := address_limit()) is not None:
        lines.append(f"    ulimit -v lets a process reserve {size(limit)}")
    with suppress(UserError, RuntimeError):  # UserError: the plan does not know the architecture
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
