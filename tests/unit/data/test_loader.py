"""Batches do not depend on ranks or micro-batches, and any step can be computed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.collate import CollatedBatch, collate_segments
from dtrain.data.loader import NO_SEQUENCE, Loader
from dtrain.data.packed_dataset import BatchCounts
from dtrain.data.packing import Segments
from dtrain.data.sampling import build_sampling_plan


class Simulated:
    """A mixture whose rows are made from their numbers: row n has documents of known tokens."""

    def __init__(
        self,
        rows: list[int],
        weights: list[float | None] | dict[int, list[float]],
        replay: float | None = None,
    ) -> None:
        by_position = weights if isinstance(weights, dict) else {0: weights}
        self.mix = build_sampling_plan(rows, by_position, ["s"] * len(rows), replay)
        self.sequences_per_epoch = self.mix.sequences_per_epoch
        self.rows_read = 0

    def sequence_ids_at(self, start: int, stop: int, seed: int):
        return self.mix.sequence_ids_at(np.arange(start, stop), seed)

    def read(self, indices) -> CollatedBatch:
        self.rows_read += len(indices)
        views = []
        for number in indices.tolist():
            ids = np.arange(number % 3 + 3, dtype=np.int64) + 10 * number
            views += [ids[: number % 3 + 1], ids[number % 3 + 1 :]]
        sizes = np.array([view.size for view in views])
        has_target = np.flatnonzero(sizes > 1)  # all tokens but the first
        rows = np.repeat(np.arange(len(indices)), 2)
        documents, labels = np.arange(rows.size), np.zeros(rows.size, int)
        runs = has_target, np.ones(has_target.size, int), sizes[has_target]
        segments = Segments(views, sizes, rows, documents, labels, *runs)
        return collate_segments(segments)

    def counts(self, indices) -> BatchCounts:
        size, extra = len(indices), int((np.asarray(indices) % 3).sum())
        return BatchCounts(size, extra + 3 * size, extra + size, 2 * size)


def computed_sequences(
    loader: Loader, step: int, ranks: int, micro_batch: int
) -> list[tuple[int, int]]:
    """(position, sequence number) of every sequence that all ranks compute in a step."""
    out = []
    for rank in range(ranks):
        for batch in loader.micro_batches(step, rank, ranks, micro_batch):
            start = 0
            for position, length in zip(batch.sequences, batch.sequence_lengths, strict=True):
                if batch.targets.numel():
                    out.append((position, int(batch.input_ids[0, start]) // 10))
                start += length
            assert start == batch.input_ids.shape[1] == sum(batch.document_lengths)
    return out


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    weighted=st.booleans(),
    global_batch=st.integers(1, 40),
    ranks=st.sampled_from([1, 2, 4, 8]),
    micro_batch=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_stream_is_independent_of_ranks_and_micro_batches(
    rows, weighted, global_batch, ranks, micro_batch, seed
) -> None:
    weights = [float(i + 1) if weighted else None for i in range(len(rows))]
    dataset = Simulated(rows, weights)
    total = dataset.sequences_per_epoch
    loader = Loader(dataset, seed=seed, global_batch=global_batch, total_sequences=total)
    stream = [
        pair
        for step in range(loader.steps)
        for pair in computed_sequences(loader, step, ranks, micro_batch)
    ]
    assert stream == list(enumerate(dataset.sequence_ids_at(0, total, seed).tolist()))
    if not weighted:
        assert sorted(row for _, row in stream) == list(range(total))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    percent=st.integers(1, 60),
    weighted=st.booleans(),
    changes_after=st.integers(0, 9),
    global_batch=st.integers(1, 24),
    ranks=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_stream_with_replay_is_independent_of_ranks_and_first_step(
    rows, percent, weighted, changes_after, global_batch, ranks, seed, data
) -> None:
    weights = {0: [float(i + 1) if weighted else None for i in range(len(rows) - 1)]}
    if weighted and changes_after:
        weights[changes_after * global_batch] = [1.0, *[0.0] * (len(rows) - 2)]
    dataset = Simulated(rows, weights, percent / 100)
    total = 2 * dataset.sequences_per_epoch
    stream = dataset.sequence_ids_at(0, total, seed).tolist()
    if len(weights) > 1:  # from that very step on there is none of the others
        main_rows = [row for row in stream[changes_after * global_batch :] if row < sum(rows[:-1])]
        assert all(row < rows[0] for row in main_rows)
    first = data.draw(st.integers(0, max(0, -(-total // global_batch) - 5)))
    loader = Loader(dataset, seed=seed, global_batch=global_batch, total_sequences=total)
    for step in range(first, min(first + 5, loader.steps)):  # a resume at `first`
        low, high = step * global_batch, min((step + 1) * global_batch, total)
        assert computed_sequences(loader, step, ranks, 1) == list(enumerate(stream))[low:high]
    main_rows = [row for row in stream if row < sum(rows[:-1])]
    if not weighted:
        n = sum(rows[:-1])
        assert all(
            sorted(main_rows[i : i + n]) == list(range(n))
            for i in range(0, len(main_rows) - n + 1, n)
        )


def test_1024_ranks_share_a_batch_of_weighted_sources() -> None:
    dataset = Simulated([900, 700], {0: [0.75, 0.25], 1024: [0.25, 0.75]})
    loader = Loader(dataset, seed=1, global_batch=1024, total_sequences=1500)
    stream = [pair for step in range(2) for pair in computed_sequences(loader, step, 1024, 1)]
    assert stream == list(enumerate(dataset.sequence_ids_at(0, 1500, 1).tolist()))
    assert sum(row < 900 for _, row in stream) == 768 + 119


def test_1024_ranks_share_a_batch() -> None:
    dataset = Simulated([1500], [None])
    loader = Loader(dataset, seed=1, global_batch=1024, total_sequences=1500)
    stream = [pair for step in range(2) for pair in computed_sequences(loader, step, 1024, 1)]
    assert stream == [pair for step in range(2) for pair in computed_sequences(loader, step, 1, 64)]
    assert sorted(row for _, row in stream) == list(range(1500))


@pytest.mark.parametrize("ranks", [1, 3, 8, 1024])
def test_every_rank_has_the_same_number_of_micro_batches(ranks: int) -> None:
    loader = Loader(Simulated([50], [None]), seed=0, global_batch=16, total_sequences=35)
    for step in range(loader.steps):
        counts = {len(list(loader.micro_batches(step, r, ranks, 3))) for r in range(min(ranks, 20))}
        assert len(counts) == 1


def test_a_distant_step_is_computed_directly() -> None:
    dataset = Simulated([10**12], [None])
    loader = Loader(dataset, seed=5, global_batch=8, total_sequences=10**13)
    late = computed_sequences(loader, 10**12, 2, 2)
    assert dataset.rows_read == 8
    assert [position for position, _ in late] == list(range(8 * 10**12, 8 * 10**12 + 8))
    again = Loader(Simulated([10**12], [None]), seed=5, global_batch=8, total_sequences=10**13)
    assert computed_sequences(again, 10**12, 4, 1) == late


def test_batches_span_the_end_of_an_epoch() -> None:
    loader = Loader(Simulated([10], [None]), seed=2, global_batch=4, total_sequences=20)
    rows = np.concatenate([loader.batch(step) for step in range(loader.steps)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_short_last_batch_is_kept() -> None:
    loader = Loader(Simulated([10], [None]), seed=2, global_batch=4, total_sequences=10)
    assert loader.steps == 3
    last = loader.batch(2)
    assert (last == NO_SEQUENCE).tolist() == [False, False, True, True]
    real = last[:2]
    tokens, targets = int((real % 3 + 3).sum()), int((real % 3 + 1).sum())
    assert loader.counts(2) == BatchCounts(2, tokens, targets, 4)


def test_a_rank_without_sequences_gets_two_tokens_and_no_target() -> None:
    loader = Loader(Simulated([10], [None]), seed=2, global_batch=4, total_sequences=9)
    (batch,) = loader.micro_batches(2, 3, 4, 1)
    assert batch.input_ids.tolist() == [[0, 0]] and batch.position_ids.tolist() == [[0, 1]]
    assert batch.target_positions.numel() == batch.targets.numel() == 0
    assert batch.document_lengths == batch.sequence_lengths == [2]
    assert batch.sequences == [11]


def test_targets_follow_their_positions_within_a_document(prepared, write_rows) -> None:
    texts = [{"text": "fox " * n} for n in (3, 40, 5, 9)]
    source = {"path": write_rows("a.jsonl", texts), "format": "text"}
    dataset = prepared("cpt", [source])
    loader = Loader(dataset, seed=0, global_batch=2, total_sequences=dataset.sequences_per_epoch)
    for step in range(loader.steps):
        (batch,) = loader.micro_batches(step, 0, 1, 2)
        ids = batch.input_ids[0]
        assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(ids[batch.target_positions + 1], batch.targets)
        assert batch.targets.numel() == loader.counts(step).supervised_tokens
        assert ids.numel() == loader.counts(step).tokens
        assert len(batch.document_lengths) == loader.counts(step).examples
        restarts = torch.cat([torch.arange(n) for n in batch.document_lengths])
        assert torch.equal(batch.position_ids[0], restarts)
        assert batch.document_starts.tolist() == (restarts == 0).nonzero()[:, 0].tolist()
        sequences = np.repeat(np.arange(len(batch.sequences)), batch.sequence_lengths)
        assert np.array_equal(batch.sequences_at(np.arange(ids.numel())), sequences)
        assert (batch.position_ids[0, batch.target_positions + 1] > 0).all()
        assert batch.targets.numel() == ids.numel() - len(batch.document_lengths)


def test_a_rank_without_sequences_reads_no_store(prepared, write_rows) -> None:
    source = {"path": write_rows("a.jsonl", [{"text": "fox"}]), "format": "text"}
    loader = Loader(prepared("cpt", [source]), seed=0, global_batch=2, total_sequences=1)
    (batch,) = loader.micro_batches(0, 1, 2, 1)
    assert batch.input_ids.tolist() == [[0, 0]] and batch.targets.numel() == 0
