"""Memory of this process: its peak, on its GPU where it has one, and what is kept for later."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start counting anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # the kernel may not allow it: the peak is then the process's own
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Greatest memory since the last reset, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_NEVER, _GREATEST_INT = -1, 2**31 - 1


def keep_freed_memory(device: torch.device) -> None:
    """Let what a CPU rank frees stay its own, as torch's caching allocator does on a GPU.

    An engine that gathers layers asks for the same large blocks at every step. glibc gives each
    back to the kernel, which fills it with zeros again: 200 to 300 thousand page faults a step of
    135M parameters. Freed blocks do not always fit again: resident memory may grow by a quarter.
    """
    if device.type != "cpu":
        return
    with suppress(AttributeError, OSError):  # another libc
        set_option = ctypes.CDLL(None).mallopt
        set_option(_ARENA_MAX, 1)  # the only one that holds more than 64 MB together
        set_option(_MMAP_THRESHOLD, _GREATEST_INT)
        set_option(_TRIM_THRESHOLD, _NEVER)
        set_option(_TOP_PAD, 64 << 20)
