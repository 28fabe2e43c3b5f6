"""How many processes this one may start that compute."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that affinity, the control group and Slurm leave to this process; at least 1."""
    bounds = [len(os.sched_getaffinity(0))]
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        bounds.append(int(quota) // int(period))
    with suppress(KeyError, ValueError):
        bounds.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, min(bounds))


def available_memory() -> int:
    """Bytes that the machine and the control group leave free, files in the page cache included."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(counts["inactive_file"])
        free = min(free, limit - used)
    return max(0, free)
