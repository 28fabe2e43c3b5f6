"""Shares are exact, rows come once an epoch, and any slice of the stream can be had alone."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.core.errors import UserError
from dtrain.data.mixing import MAX_BLOCK, block_quotas, mix

sizes = st.lists(st.integers(1, 300), min_size=1, max_size=5)
seeds = st.integers(0, 2**63 - 1)


def plain(rows: list[int]):
    return mix(rows, [None] * len(rows), [f"s{i}" for i in range(len(rows))])


@given(sizes, seeds, st.integers(0, 1000))
def test_without_weights_each_row_comes_once_an_epoch(rows, seed, epoch) -> None:
    mixture = plain(rows)
    n = mixture.rows_per_epoch
    assert n == sum(rows)
    out = mixture.rows_at(np.arange(epoch * n, (epoch + 1) * n), seed)
    assert sorted(out.tolist()) == list(range(n))


@given(sizes, seeds, st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.booleans())
def test_a_slice_is_the_same_alone_and_in_a_longer_one(rows, seed, a, b, c, weighted) -> None:
    start, middle, stop = sorted((a, b, c))
    weights = [float(i + 1) if weighted else None for i in range(len(rows))]
    mixture = mix(rows, weights, ["s"] * len(rows))
    whole = mixture.rows_at(np.arange(start, stop), seed)
    parts = [mixture.rows_at(np.arange(*ends), seed) for ends in ((start, middle), (middle, stop))]
    assert whole.tolist() == np.concatenate(parts).tolist()


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), seeds, st.integers(0, 10**6))
def test_each_block_has_exact_shares(weights, seed, block) -> None:
    rows = [7 * (i + 1) for i in range(len(weights))]
    mixture = mix(rows, [w / 10 for w in weights], ["s"] * len(rows))
    size = sum(mixture.quotas)
    out = mixture.rows_at(np.arange(block * size, (block + 1) * size), seed)
    source = np.searchsorted(mixture.first_rows, out, side="right") - 1
    counts = np.bincount(source, minlength=len(rows))
    assert (counts * sum(weights) == np.array(weights) * size).all()


@given(st.integers(1, 60), st.integers(1, 60), seeds)
def test_a_weighted_source_repeats_a_row_only_after_all_others(many, few, seed) -> None:
    mixture = mix([many, few], [0.75, 0.25], ["a", "b"])
    out = mixture.rows_at(np.arange(40 * max(many, few)), seed)  # whole blocks of four
    for low, n in ((0, many), (many, few)):
        times = Counter(out[(out >= low) & (out < low + n)].tolist())
        assert len(times) == n
        assert max(times.values()) - min(times.values()) <= 1


def test_an_epoch_of_a_mixture_is_one_pass_over_the_heaviest_source() -> None:
    mixture = mix([95, 1000], [0.95, 0.05], ["a", "b"])
    assert mixture.quotas == (19, 1)
    assert mixture.rows_per_epoch == 100
    out = mixture.rows_at(np.arange(100), 3)
    assert sorted(out[out < 95].tolist()) == list(range(95))
    assert mix([10, 3], [2.0, 1.0], ["a", "b"]).rows_per_epoch == 15
    assert mix([11, 3], [3.0, 2.0], ["a", "b"]).rows_per_epoch == 19  # 18.3, rounded up


def test_shares_that_never_come_out_even_are_rounded_to_the_nearest() -> None:
    weights = ("1", "3.14159265", "2.7182818")
    quotas = block_quotas([Fraction(weight) for weight in weights])
    assert sum(quotas) == MAX_BLOCK
    exact = np.array([1.0, 3.14159265, 2.7182818]) / 6.85987445 * MAX_BLOCK
    assert np.abs(np.array(quotas) - exact).max() < 1


def test_a_weight_for_some_sources_only_is_refused() -> None:
    with pytest.raises(UserError, match=r"some have none: b\.jsonl") as error:
        mix([1, 1], [0.5, None], ["a.jsonl", "b.jsonl"])
    assert "each source a weight" in error.value.fix


def test_a_weight_too_small_to_ever_come_is_refused() -> None:
    with pytest.raises(UserError, match="the weight of b is under one row in 1024"):
        mix([1, 1], [1.0, 1.2345e-6], ["a", "b"])


@given(sizes, st.integers(1, 99), st.integers(1, 40), seeds)
def test_replay_has_its_exact_share_and_every_other_row_comes_once(
    rows, percent, replayed, seed
) -> None:
    share = percent / 100
    mixture = mix([*rows, replayed], [None] * len(rows), [*"abcde"[: len(rows)], "r"], share)
    block = sum(mixture.quotas)
    out = mixture.rows_at(np.arange(7 * block), seed)
    assert (out >= sum(rows)).sum() * 100 == 7 * block * percent
    stream = mixture.rows_at(np.arange(3 * mixture.rows_per_epoch + block), seed).tolist()
    for low, n in ((0, sum(rows)), (sum(rows), replayed)):
        own = [row for row in stream if low <= row < low + n]
        for start in range(0, len(own) - n + 1, n):
            assert sorted(own[start : start + n]) == list(range(low, low + n))
    a, b = len(stream) // 3, len(stream) // 2  # any part of it can be had alone
    assert mixture.rows_at(np.arange(a, b), seed).tolist() == stream[a:b]


@given(sizes, st.integers(1, 99), st.integers(1, 400), seeds)
def test_an_epoch_beside_replay_holds_each_own_row(rows, percent, replayed, seed) -> None:
    mixture = mix([*rows, replayed], [None] * len(rows), ["s"] * len(rows) + ["r"], percent / 100)
    epochs = 3
    out = mixture.rows_at(np.arange(epochs * mixture.rows_per_epoch), seed)
    first = set(out[: mixture.rows_per_epoch].tolist())
    assert first >= set(range(sum(rows)))
    times = np.bincount(out, minlength=sum(rows))[: sum(rows)]
    assert times.min() >= epochs and times.max() - times.min() <= 1
    blocks = -(-sum(rows) // mixture.quotas[0])
    assert mixture.rows_per_epoch <= blocks * sum(mixture.quotas)  # none for nothing


def test_replay_beside_weights_leaves_their_proportions() -> None:
    mixture = mix([10, 10, 10], [3.0, 1.0], ["a", "b", "r"], 0.2)
    assert mixture.quotas == (3, 1, 1)
    with pytest.raises(UserError, match="the weight of r is under one row"):
        mix([1, 1], [None], ["a", "r"], 1e-7)
