"""Only the GPUs of this job are reported: by index, by UUID, and as MIG devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
