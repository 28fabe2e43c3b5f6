"""The compiled loop reads what numpy reads, from any number of shards, and trusts no file."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.core.errors import UserError
from dtrain.data import collate, shards
from dtrain.data.collate import NativeCollator, collate_segments
from dtrain.data.loader import Loader


@pytest.fixture
def dataset(prepared, write_rows, monkeypatch):
    """Two sources of many small shards."""
    monkeypatch.setattr(shards, "BLOCK_ROWS", 3)
    rows = [{"instruction": f"Say {n}", "output": "fox " * (n % 9 + 1)} for n in range(60)]
    rows[7]["history"] = [["Who?", "Me."], ["Why?", "So."]]
    sources = [{"path": write_rows(f"{n}.jsonl", rows[30 * n :][:30])} for n in (0, 1)]
    return prepared("sft", sources, sequence_length=200)


@pytest.fixture
def stream(prepared, write_rows):
    """Texts that are cut where a row is full."""
    texts = [{"text": "fox " * n} for n in (3, 400, 1, 90, 9)]
    return prepared("cpt", [{"path": write_rows("t.jsonl", texts), "format": "text"}])


def same(first, second) -> bool:
    arrays = all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(first[:6], second[:6], strict=True)
    )
    return arrays and first[6:] == second[6:]


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_native_and_numpy_collation_agree(kind, request) -> None:
    packed = request.getfixturevalue(kind)
    assert isinstance(packed._native_collator, NativeCollator)
    rows = np.random.default_rng(0).permutation(packed.sequences_per_epoch)
    for start in range(0, len(rows), 3):
        some = rows[start : start + 3]
        assert same(packed.read(some), collate_segments(packed.gather(some)))


def test_few_shards_are_mapped_at_a_time(dataset, monkeypatch) -> None:
    assert sum(len(source.store.shards) for source in dataset.sources) == 20
    monkeypatch.setattr(collate, "OPEN_SHARDS", 1)
    every = np.arange(dataset.sequences_per_epoch)
    assert same(dataset.read(every), collate_segments(dataset.gather(every)))
    assert len(dataset._native_collator._open) == 1


def test_batches_are_the_same_without_a_compiler(dataset, monkeypatch) -> None:
    def batches():
        loader = Loader(
            dataset, seed=0, global_batch=4, total_sequences=dataset.sequences_per_epoch
        )
        return [b for step in range(loader.steps) for b in loader.micro_batches(step, 0, 1, 3)]

    fast = batches()
    monkeypatch.setattr(collate, "load_library", lambda *_: (None, "no C++ compiler"))
    monkeypatch.setattr(collate, "_load_library", collate._load_library.__wrapped__)
    del dataset.__dict__["_native_collator"]
    slow = batches()
    assert dataset._native_collator is None
    for native, fallback in zip(fast, slow, strict=True):
        for name, value in vars(native).items():
            assert np.array_equal(value, getattr(fallback, name)), name


@pytest.mark.parametrize(
    ("field", "value"), [("document", 10**9), ("document", -1), ("tokens", 10**6), ("start", -5)]
)
def test_corrupt_segments_are_reported_as_damage(stream, field, value) -> None:
    store = stream.sources[0].store
    store.segments = store.segments.copy()
    store.segments[field][0] = value
    with pytest.raises(UserError, match="damaged"):
        stream.read(np.array([0]))
