"""Cores and memory that the machine, the control group and Slurm leave to this process."""

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


def oom_kills() -> int:
    """Processes of this one's control group that the kernel has killed because memory ran out."""
    count = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            own = path.lstrip("/")
            if not controllers:  # version 2
                count += _oom_kills(CGROUP / own / "memory.events")
            elif controllers == "memory":
                count += _oom_kills(CGROUP / "memory" / own / "memory.oom_control")
    return count


def _oom_kills(file: Path) -> int:
    with suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])
    return 0
