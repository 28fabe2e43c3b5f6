"""A disk that fills up in the middle of a write: said as such, and nothing counts as written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dtrain.augmentation.request_pool import Journal
from dtrain.core.errors import UserError
from dtrain.core.files import atomic_folder, write_atomic
from dtrain.core.os_errors import explained_os_errors
from dtrain.data.store_writer import _write_array
from dtrain.merge.stream import HashingWriter
from dtrain.monitoring.metrics import Metrics, read_metrics

MB = 1 << 20


def adapter(path: Path) -> None:
    with atomic_folder(path) as folder:
        save_file({"a": torch.zeros(MB)}, folder / "adapter_model.safetensors")


def merged_shard(path: Path) -> None:
    writer = HashingWriter(path.with_name(".temporary"))
    try:
        writer.write(memoryview(bytes(4 * MB)))
        writer.finish()
    finally:
        writer.close()
    path.touch()


def array(path: Path) -> None:
    _write_array(path.with_name(".temporary"), np.zeros(MB))
    path.touch()


def text(path: Path) -> None:
    write_atomic(path, "x" * 2 * MB)


@pytest.mark.parametrize("write", [adapter, merged_shard, array, text])
def test_full_disk_is_named_and_nothing_counts_as_written(
    mount_disk: Callable[[str], Path], write: Callable[[Path], None]
) -> None:
    target = mount_disk("1m") / "target"
    full = pytest.raises(UserError, match=r"No space left on device\n.*free some space")
    with full, explained_os_errors():
        write(target)
    assert not target.exists()


def test_line_that_did_not_fit_is_not_a_reply(mount_disk: Callable[[str], Path]) -> None:
    path = mount_disk("64k") / "replies.jsonl"
    journal, number = Journal(path, {"key": int}), 0
    with pytest.raises(UserError, match="No space left"), explained_os_errors():
        for number in range(100):
            journal.write({"key": number, "reply": "x" * 1000})
    journal.close()
    assert Journal(path, {"key": int}).done == {(n,) for n in range(number)}


def test_metrics_that_did_not_fit_are_dropped(mount_disk: Callable[[str], Path]) -> None:
    path = mount_disk("64k") / "metrics.jsonl"
    metrics, step = Metrics(path, 0), 0
    with pytest.raises(UserError, match="No space left"), explained_os_errors():
        for step in range(1, 1000):
            metrics.write({"step": step, "note": "x" * 1000})
    assert [line["step"] for line in read_metrics(path)] == list(range(1, step))
    assert json.loads(path.read_text().split("\n")[0])["step"] == 1
