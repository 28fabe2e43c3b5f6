"""Host memory pinned for GPU copies; a fake CUDA runtime counts it."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from dtrain.checkpoints.shard_file import PAGE_BYTES, HostShard


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Address → bytes of the memory pinned now."""
    ranges: dict[int, int] = {}

    def register(start: int, size: int, flags: int) -> int:
        ranges[start] = size
        return 0

    def unregister(start: int) -> int:
        del ranges[start]
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return ranges


def test_save_pins_only_the_memory_it_needs(locked) -> None:
    elements = (1 << 18) + 1  # a little more than a power of two
    shard = HostShard({"a|weight|0": torch.ones(elements)}, pinned=True)
    (size,) = locked.values()
    assert 0 < size - 4 * elements < 2 * PAGE_BYTES
    del shard
    gc.collect()
    assert not locked, "memory that is freed must not stay locked"
