"""CPU cores and memory available to this process under affinity, cgroup and Slurm limits."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """The smallest of the affinity mask, the cgroup quota and Slurm's allocation; at least 1."""
    limits = [len(os.sched_getaffinity(0))]
    with suppress(OSError, ValueError):
        quota, period = (CGROUP / "cpu.max").read_text().split()
        limits.append(int(quota) // int(period))
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, min(limits))


def available_memory() -> int:
    """Free bytes of the machine or the cgroup, counting page cache that can be reclaimed."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        used = int((CGROUP / "memory.current").read_text()) - int(counts["inactive_file"])
        free = min(free, limit - used)
    return max(0, free)


def oom_kills() -> int:
    """Number of processes in this cgroup that the kernel killed because memory ran out."""
    count = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            relative = path.lstrip("/")
            if not controllers:  # cgroup v2
                count += _read_oom_kills(CGROUP / relative / "memory.events")
            elif controllers == "memory":
                count += _read_oom_kills(CGROUP / "memory" / relative / "memory.oom_control")
    return count


def _read_oom_kills(file: Path) -> int:
    with suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])
    return 0
