"""The CPU cores and memory that this process may use, and the GPUs of this job, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """The smallest of the affinity mask, the cgroups' quotas and a Slurm task's; at least 1."""
    return _least_cores("SLURM_CPUS_PER_TASK")


def job_cores() -> int:
    """As `available_cores`, of all tasks of a Slurm job on this machine: for what starts ranks."""
    return _least_cores("SLURM_CPUS_ON_NODE")


def _least_cores(slurm_variable: str) -> int:
    limits = [len(os.sched_getaffinity(0))]
    for group in _cgroups("cpu"):
        with suppress(OSError, ValueError):
            quota, period = _words(group / "cpu.max")
            limits.append(int(quota) // int(period))
        with suppress(OSError, ValueError):
            microseconds = _number(group / "cpu.cfs_quota_us")  # -1: no limit
            if microseconds > 0:
                limits.append(microseconds // _number(group / "cpu.cfs_period_us"))
    with suppress(KeyError, ValueError):
        limits.append(int(os.environ[slurm_variable]))
    return max(1, min(limits))


def workers_that_fit(bytes_each: int) -> int:
    """How many workers, each with a core and so much memory, there is room for; at least 1."""
    return max(1, min(available_cores(), available_memory() // bytes_each))


def available_memory() -> int:
    """Free bytes of the machine or the fullest of its cgroups, counting page cache as free."""
    try:
        free = [int(psutil.virtual_memory().available)]
    except (OSError, RuntimeError):  # no /proc
        free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _cgroups("memory"):
        for limit, used, cached in MEMORY_FILES:
            with suppress(OSError, ValueError, KeyError):
                reclaimable = int(_table(group / "memory.stat")[cached])
                free.append(_number(group / limit) - _number(group / used) + reclaimable)
    return max(0, min(free))


# Of a cgroup, version 2 and 1: the files of its limit and use, and the page cache in memory.stat.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def oom_kills() -> int:
    """Number of processes in this cgroup that the kernel killed because memory ran out."""
    count = 0
    for group in _own_cgroups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError, ValueError, KeyError):
                count += int(_table(group / name)["oom_kill"])
    return count


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups, version 1 or 2, and of those around each of them.

    Every one of them limits the process. A container may see only the outermost.
    """
    for group in [*_own_cgroups(controller), CGROUP, CGROUP / controller]:
        yield from (folder for folder in [group, *group.parents] if folder.is_relative_to(CGROUP))


def _own_cgroups(controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in."""
    with suppress(OSError, ValueError):
        for line in OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").split("\n"):
            _, controllers, path = line.split(":", 2)  # ValueError: behind the last line
            if not controllers:  # version 2
                yield CGROUP / path.lstrip("/")
            elif controller in controllers.split(","):
                yield CGROUP / controller / path.lstrip("/")


def _number(file: Path) -> int:
    return int(file.read_text(encoding="utf-8"))


def _words(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split()


def _table(file: Path) -> dict[str, str]:
    """The lines of a file with a key and a value each."""
    words = _words(file)
    return dict(zip(words[::2], words[1::2], strict=True))


FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "uuid",
)
_GPU = re.compile(r"^GPU \d+: .*\(UUID: (?P<uuid>[^)]+)\)")
_MIG = re.compile(
    r"^\s+MIG (?P<profile>\S*?(?P<gib>\d+)gb\S*).*\(UUID: (?P<uuid>MIG-[^)]+)\)", re.IGNORECASE
)

Row = dict[str, str]
_NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


def driver_versions() -> dict[str, str]:
    """The version of NVIDIA's kernel driver; empty without one."""
    with suppress(OSError):
        text = _NVIDIA_VERSION.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
        return {"driver": match[1]} if match else {}
    return {}


def gpus() -> list[Row] | None:
    """What nvidia-smi reports of each GPU of this job; None if there is no nvidia-smi.

    Unless the batch system hides them, nvidia-smi also lists the GPUs of other jobs. This job's are
    in CUDA_VISIBLE_DEVICES, by index, by UUID, or as MIG devices.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        text = _nvidia_smi(f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
        rows = [dict(zip(FIELDS, line.split(", "), strict=False)) for line in text.splitlines()]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return rows if visible is None else _visible(rows, visible.split(","))
    except (OSError, subprocess.SubprocessError) as error:
        return [{"problem": f"nvidia-smi failed: {error}"}]


def _nvidia_smi(*options: str) -> str:
    command = ["nvidia-smi", *options]
    result = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
    )
    return result.stdout.strip()


def _visible(rows: list[Row], names: list[str]) -> list[Row]:
    """The GPUs that CUDA sees: it stops at the first name that it does not know."""
    visible: list[Row] = []
    mig_devices = (
        _mig_devices(rows) if any(name.strip().startswith("MIG-") for name in names) else []
    )
    for name in names:
        row = _find_gpu([*rows, *mig_devices], name.strip())
        if row is None:
            break
        visible.append(row)
    return visible


def _find_gpu(rows: list[Row], name: str) -> Row | None:
    for row in rows:
        if name.isdecimal() and row["index"] == name:
            return row
        if name.startswith(("GPU-", "MIG-")) and row.get("uuid", "").startswith(name):
            return row
    return None


def _mig_devices(rows: list[Row]) -> list[Row]:
    """A row for each MIG device, with no memory in use: other devices share its GPU's figures."""
    devices: list[Row] = []
    gpu: Row = {}
    for line in _nvidia_smi("-L").splitlines():
        if head := _GPU.match(line):
            gpu = next((row for row in rows if row.get("uuid") == head["uuid"]), {})
        elif (device := _MIG.match(line)) and gpu:
            devices.append(
                gpu
                | {
                    "index": f"{gpu['index']} MIG {device['profile']}",
                    "name": f"{gpu['name']} MIG {device['profile']}",
                    "memory.total": str(int(device["gib"]) * 1024),
                    "memory.used": "0",
                    "uuid": device["uuid"],
                }
            )
    return devices
