"""The CPU cores and memory that this process may use, and the GPUs of this job, without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
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
