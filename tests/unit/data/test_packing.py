"""No document is lost, doubled or cut where it must not be, and rows are as full as can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.packing import (
    PackingPlan,
    best_fit_decreasing,
    keep_sequences,
    pack_one_document,
    pack_stream,
    pack_whole,
)

CAPACITY = 50
short = st.lists(st.integers(1, CAPACITY), max_size=200).map(np.array)
any_length = st.lists(st.integers(1, 4 * CAPACITY), max_size=60).map(np.array)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The textbook's best-fit decreasing, one document at a time: free space of each row."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(free) if space >= length]
        if not fitting:
            free.append(capacity)
            fitting = [len(free) - 1]
        free[min(fitting, key=lambda row: free[row])] -= length
    return sorted(free)


def tokens_of(plan: PackingPlan) -> list[tuple[int, int]]:
    return [
        (int(document), token)
        for document, start, size in plan.segments.tolist()
        for token in range(start, start + size)
    ]


def row_sizes(plan: PackingPlan) -> list[int]:
    sizes = plan.segments["tokens"].tolist()
    return [sum(sizes[a:b]) for a, b in zip(plan.sequences[:-1], plan.sequences[1:], strict=True)]


@given(short)
def test_packing_equals_textbook_best_fit(lengths: np.ndarray) -> None:
    rows = best_fit_decreasing(lengths, CAPACITY)
    used = np.bincount(rows, weights=lengths).astype(int) if rows.size else np.array([], int)
    assert sorted(CAPACITY - used) == plain_best_fit(lengths.tolist(), CAPACITY)


@given(short)
def test_best_fit_keeps_each_document_in_one_sequence(lengths: np.ndarray) -> None:
    plan = pack_whole(lengths, CAPACITY)
    assert sorted(plan.segments["document"].tolist()) == list(range(lengths.size))
    assert plan.segments["tokens"].tolist() == lengths[plan.segments["document"]].tolist()
    assert all(0 < size <= CAPACITY for size in row_sizes(plan))


@given(any_length)
def test_stream_packing_keeps_every_token_in_order(lengths: np.ndarray) -> None:
    plan = pack_stream(lengths, CAPACITY)
    everything = [(d, t) for d, n in enumerate(lengths.tolist()) for t in range(n)]
    assert tokens_of(plan) == everything
    assert all(size == CAPACITY for size in row_sizes(plan)[:-1])


@given(any_length)
def test_unpacked_sequences_contain_one_document_each_without_loss(lengths: np.ndarray) -> None:
    plan = pack_one_document(lengths, CAPACITY)
    assert tokens_of(plan) == [(d, t) for d, n in enumerate(lengths.tolist()) for t in range(n)]
    assert set(np.diff(plan.sequences).tolist()) <= {1}
    assert all(size <= CAPACITY for size in row_sizes(plan))


@given(short, st.randoms())
def test_dropped_sequences_drop_their_segments(lengths: np.ndarray, random) -> None:
    plan = pack_whole(lengths, CAPACITY)
    keep = np.array([random.random() < 0.5 for _ in range(plan.sequences.size - 1)], dtype=bool)
    sizes = [size for size, kept in zip(row_sizes(plan), keep, strict=True) if kept]
    assert row_sizes(keep_sequences(plan, keep)) == sizes


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_a_hundred_thousand_documents_fill_their_sequences(capacity: int) -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 120.0, 100_000).astype(np.int64) + 8
    rows = best_fit_decreasing(np.minimum(lengths, capacity), capacity)
    least = -(-int(lengths.sum()) // capacity)
    assert rows.max() + 1 <= least * 1.0002 + 1
