"""Weights are exact, sequences occur once an epoch, and any stream slice can be computed alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.core.errors import UserError
from dtrain.data.sampling import MAX_PATTERN, SamplingPlan, build_sampling_plan, pattern_quotas

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=5)
seeds = st.integers(0, 2**63 - 1)


def plain(rows: list[int]):
    return build_sampling_plan(rows, {0: [None] * len(rows)}, [f"s{i}" for i in range(len(rows))])


@given(sizes, seeds, st.integers(0, 1000))
def test_unweighted_epochs_contain_each_sequence_once(rows, seed, epoch) -> None:
    dataset = plain(rows)
    n = dataset.sequences_per_epoch
    assert n == sum(rows)
    out = dataset.sequence_ids_at(np.arange(epoch * n, (epoch + 1) * n), seed)
    assert sorted(out.tolist()) == list(range(n))


@given(sizes, seeds, st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.booleans())
def test_stream_slice_does_not_depend_on_its_length(rows, seed, a, b, c, weighted) -> None:
    start, middle, stop = sorted((a, b, c))
    weights = [float(i + 1) if weighted else None for i in range(len(rows))]
    dataset = build_sampling_plan(rows, {0: weights}, ["s"] * len(rows))
    whole = dataset.sequence_ids_at(np.arange(start, stop), seed)
    sources = [
        dataset.sequence_ids_at(np.arange(*ends), seed)
        for ends in ((start, middle), (middle, stop))
    ]
    assert whole.tolist() == np.concatenate(sources).tolist()


weight_lists = st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any)


def sources_of(dataset: SamplingPlan, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(dataset.first_sequences, rows, side="right") - 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 500), weight_lists), min_size=1, max_size=4),
    st.tuples(*[st.integers(1, 60)] * 3),
    seeds,
)
def test_phases_have_exact_shares_and_passes_each_sequence_once(phases, rows, seed) -> None:
    starts = np.cumsum([0, *(length for length, _ in phases)])
    weights = {int(a): [w / 10 for w in ws] for a, (_, ws) in zip(starts, phases, strict=False)}
    dataset = build_sampling_plan(list(rows), weights, [*"abc"])
    stream = dataset.sequence_ids_at(np.arange(starts[-1]), seed)
    for start, (length, ws) in zip(starts, phases, strict=False):
        actual = sources_of(dataset, stream[start : start + length])[:, None] == np.arange(3)
        expected = np.arange(1, length + 1)[:, None] * np.array(ws) / sum(ws)
        assert np.abs(np.cumsum(actual, axis=0) - expected).max() < 1  # at any place in it
    for first, n in zip(dataset.first_sequences, rows, strict=False):
        selected = stream[(stream >= first) & (stream < first + n)]
        for begin in range(0, selected.size - n + 1, n):
            assert sorted(selected[begin : begin + n]) == list(range(first, first + n))
    a, b = np.sort(np.random.default_rng(seed).integers(0, starts[-1], 2))
    assert dataset.sequence_ids_at(np.arange(a, b), seed).tolist() == stream[a:b].tolist()


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(1, 5),
    seeds,
)
def test_epochs_repeat_the_heaviest_source_exactly(sources, epochs, seed) -> None:
    rows, weights = [n for n, _ in sources], [w for _, w in sources]
    dataset = build_sampling_plan(rows, {0: [float(w) for w in weights]}, ["s"] * len(rows))
    heaviest = max(range(len(rows)), key=lambda i: (weights[i], rows[i]))
    stream = dataset.sequence_ids_at(np.arange(dataset.sequences_in_epochs(epochs)), seed)
    times = np.bincount(stream, minlength=sum(rows))
    low, high = dataset.first_sequences[heaviest : heaviest + 2]
    assert (times[low:high] == epochs).all()
    assert sources_of(dataset, stream)[-1] == heaviest  # and not a row more


def test_weights_are_exact_at_distant_positions() -> None:
    dataset = build_sampling_plan(
        [10**12, 10**11], {0: [0.9, 0.1], 7 * 10**11: [0.25, 0.75]}, ["a", "b"]
    )
    positions = 10**12 + np.arange(4000)
    stream = dataset.sequence_ids_at(positions, 3)
    assert (stream < 10**12).sum() == 1000
    assert np.unique(stream[stream < 10**12]).size == 1000
    assert dataset.used[1].tolist() == [63 * 10**10, 7 * 10**10]
    assert (
        dataset.sequences_in_epochs(1) == 7 * 10**11 + 4 * 10**10
    )  # the last 3e10 rows of b at 3 of 4


def test_a_weighted_epoch_is_one_pass_over_the_heaviest_source() -> None:
    dataset = build_sampling_plan([95, 1000], {0: [0.95, 0.05]}, ["a", "b"])
    assert dataset.phases[0].quotas == (19, 1)
    assert dataset.sequences_per_epoch in (99, 100)  # the last row may be of the other source
    out = dataset.sequence_ids_at(np.arange(dataset.sequences_per_epoch), 3)
    assert sorted(out[out < 95].tolist()) == list(range(95))
    assert (
        dataset.sequences_in_epochs(0.4)
        < dataset.sequences_per_epoch
        < dataset.sequences_in_epochs(1.5)
    )


def test_inexact_shares_are_rounded_to_the_nearest() -> None:
    weights = ("1", "3.14159265", "2.7182818")
    quotas = pattern_quotas([Fraction(weight) for weight in weights])
    assert sum(quotas) == MAX_PATTERN
    exact = np.array([1.0, 3.14159265, 2.7182818]) / 6.85987445 * MAX_PATTERN
    assert np.abs(np.array(quotas) - exact).max() < 1


def test_weights_for_some_sources_only_are_rejected() -> None:
    with pytest.raises(UserError, match=r"some have none: b\.jsonl") as error:
        build_sampling_plan([1, 1], {0: [0.5, None]}, ["a.jsonl", "b.jsonl"])
    assert "each source a weight" in error.value.fix


def test_a_weight_below_one_sequence_is_rejected() -> None:
    with pytest.raises(UserError, match="the weight of b is less than one sequence in 4096"):
        build_sampling_plan([1, 1], {0: [1.0, 1.2345e-6]}, ["a", "b"])


@given(sizes, st.integers(1, 99), st.integers(1, 40), seeds)
def test_replay_has_its_exact_share_and_other_sequences_come_once(
    rows, percent, replayed, seed
) -> None:
    share = percent / 100
    dataset = build_sampling_plan(
        [*rows, replayed], {0: [None] * len(rows)}, [*"abcde"[: len(rows)], "r"], share
    )
    block = sum(dataset.phases[0].quotas)
    out = dataset.sequence_ids_at(np.arange(7 * block), seed)
    assert (out >= sum(rows)).sum() * 100 == 7 * block * percent
    stream = dataset.sequence_ids_at(
        np.arange(3 * dataset.sequences_per_epoch + block), seed
    ).tolist()
    for low, n in ((0, sum(rows)), (sum(rows), replayed)):
        selected = [row for row in stream if low <= row < low + n]
        for start in range(0, len(selected) - n + 1, n):
            assert sorted(selected[start : start + n]) == list(range(low, low + n))
    a, b = len(stream) // 3, len(stream) // 2  # any part of it can be had alone
    assert dataset.sequence_ids_at(np.arange(a, b), seed).tolist() == stream[a:b]


@given(sizes, st.integers(1, 99), st.integers(1, 400), seeds)
def test_an_epoch_with_replay_contains_each_sequence(rows, percent, replayed, seed) -> None:
    dataset = build_sampling_plan(
        [*rows, replayed], {0: [None] * len(rows)}, ["s"] * len(rows) + ["r"], percent / 100
    )
    epochs = 3
    out = dataset.sequence_ids_at(np.arange(dataset.sequences_in_epochs(epochs)), seed)
    first = set(out[: dataset.sequences_per_epoch].tolist())
    assert first >= set(range(sum(rows)))
    times = np.bincount(out, minlength=sum(rows))[: sum(rows)]
    assert (times == epochs).all()
    blocks = -(-sum(rows) // dataset.phases[0].quotas[0])
    assert dataset.sequences_per_epoch <= blocks * sum(dataset.phases[0].quotas)  # none for nothing


def test_replay_keeps_the_proportions_of_weights() -> None:
    dataset = build_sampling_plan([10, 10, 10], {0: [3.0, 1.0]}, ["a", "b", "r"], 0.2)
    assert dataset.phases[0].quotas == (3, 1, 1)
    with pytest.raises(UserError, match="the weight of r is less than one sequence"):
        build_sampling_plan([1, 1], {0: [None]}, ["a", "r"], 1e-7)
