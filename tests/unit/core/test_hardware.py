"""Only the GPUs of this job are reported; the limits of all cgroups around it count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.core import hardware
from dtrain.core.hardware import gpus

DRIVER = """#!/bin/sh
if [ "$1" = -L ]; then
cat <<'LIST'
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa-0)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bbbb-1)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111-2222)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-3333-4444)
GPU 2: NVIDIA A100-SXM4-80GB (UUID: GPU-cccc-2)
LIST
else
echo '0, NVIDIA A100-SXM4-80GB, 81920, 70000, 7, GPU-aaaa-0'
echo '1, NVIDIA A100-SXM4-80GB, 81920, 60000, 0, GPU-bbbb-1'
echo '2, NVIDIA A100-SXM4-80GB, 81920, 3, 0, GPU-cccc-2'
fi
"""


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake nvidia-smi with three GPUs: another job uses the first, the second has MIG devices."""
    program = tmp_path / "nvidia-smi"
    program.write_text(DRIVER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1", "2"]),
        ("2", ["2"]),
        ("2,0", ["2", "0"]),
        ("", []),
        ("1,-1,2", ["1"]),  # CUDA stops at the first unknown name
        ("7", []),
        ("GPU-cccc-2", ["2"]),
        ("GPU-cc", ["2"]),  # CUDA accepts a unique prefix
        ("MIG-3333-4444", ["1 MIG 1g.10gb+me"]),
        ("MIG-1111-2222, MIG-3333-4444", ["1 MIG 3g.40gb", "1 MIG 1g.10gb+me"]),
        ("MIG-5555", []),
    ],
)
def test_only_gpus_of_this_job_are_reported(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [row["index"] for row in gpus() or []] == expected


def test_mig_device_reports_its_own_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1111-2222")
    [row] = gpus() or []
    assert row["memory.total"] == "40960" and row["memory.used"] == "0"
    assert row["name"] == "NVIDIA A100-SXM4-80GB MIG 3g.40gb"


def write_group(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


def limit_2(folder: Path, limit: object, used: int, cached: int = 0) -> None:
    stat = f"anon {used - cached}\ninactive_file {cached}"
    write_group(folder, memory__max=limit, memory__current=used, memory__stat=stat)


def limit_1(folder: Path, limit: object, used: int, cached: int = 0) -> None:
    stat = f"inactive_file 7\ntotal_inactive_file {cached}"
    names = {"memory__limit_in_bytes": limit, "memory__usage_in_bytes": used, "memory__stat": stat}
    write_group(folder, **names)


MB = 1 << 20


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"": ("none", 0, 0), "job": (90 * MB, 50 * MB, 10 * MB)}, 50 * MB),
        # the lowest counts, wherever in the tree it is
        ({"job": (60 * MB, 50 * MB, 0), "job/step": (900 * MB, 5 * MB, 0)}, 10 * MB),
        ({"job": (900 * MB, 50 * MB, 0), "job/step": (20 * MB, 5 * MB, 0)}, 15 * MB),
        ({"job/step": ("none", 5 * MB, 0), "": (30 * MB, 9 * MB, 0)}, 21 * MB),
        ({"job/step": (5 * MB, 6 * MB, 0)}, 0),
        ({"elsewhere": (5 * MB, MB, 0)}, None),
    ],
)
def test_lowest_limit_of_nested_cgroups_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    limits: dict[str, tuple[object, int, int]],
    expected: int | None,
) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/job/step\n" if version == 2 else "4:cpu,memory:/job/step\n0::/\n")
    monkeypatch.setattr(hardware, "CGROUP", root)
    monkeypatch.setattr(hardware, "OWN_CGROUPS", own)
    unlimited = hardware.available_memory()
    for name, (limit, used, cached) in limits.items():
        no_limit = "max" if version == 2 else 9223372036854771712
        write = limit_2 if version == 2 else limit_1
        folder = root / name if version == 2 else root / "memory" / name
        write(folder, no_limit if limit == "none" else limit, used, cached)
    if expected is None:
        assert hardware.available_memory() > unlimited / 2
    else:
        assert hardware.available_memory() == expected
        assert hardware.workers_that_fit(16 * MB) == max(
            1, min(hardware.available_cores(), expected // (16 * MB))
        )


def test_quota_of_an_outer_cgroup_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text("3:cpu,cpuacct:/job/step\n0::/job/step\n")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    write_group(tmp_path / "job", cpu__max="1600000 100000")
    write_group(tmp_path / "job/step", cpu__max="max 100000")
    assert hardware.available_cores() == 16
    write_group(tmp_path / "cpu/job", cpu__cfs_quota_us=400000, cpu__cfs_period_us=100000)
    write_group(tmp_path / "cpu/job/step", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert hardware.available_cores() == 4


def test_machine_without_proc_and_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(hardware, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(hardware, "OWN_CGROUPS", tmp_path / "none")
    monkeypatch.setattr("psutil.virtual_memory", fail)
    assert hardware.available_memory() > MB and hardware.oom_kills() == 0
