"""Exact and near duplicates: hashes, similarity estimates, and the search for equal keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data import duplicates
from dtrain.data.duplicates import minhash_signatures, shingle_hashes


def test_shingles_of_a_text_do_not_depend_on_its_batch() -> None:
    texts = ["", "abc", "abcdef", "一二三四五六七"]
    hashes, offsets = shingle_hashes(texts, 5)
    assert np.diff(offsets).tolist() == [0, 1, 2, 3]
    for index, text in enumerate(texts):
        alone, _ = shingle_hashes([text], 5)
        assert (hashes[offsets[index] : offsets[index + 1]] == alone).all()


def test_similarity_estimates_that_of_the_shingle_sets() -> None:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), 2000))
    half = text[:1000] + "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), 1000))
    sketches = minhash_signatures([text, half]).astype(np.uint8)
    similarity = duplicates._estimate_similarity(sketches, np.array([1]), np.array([0]))[0]
    assert abs(similarity - 1 / 3) < 0.1


def test_many_equal_rows_take_linear_work() -> None:
    matrix = minhash_signatures(["the same text again and again"]).repeat(20_000, axis=0)
    done = np.zeros(20_000, bool)
    blocks = list(duplicates.near_duplicates(matrix.astype(np.uint8), 0.8, done))
    later, earlier, similarity = (np.concatenate(column) for column in zip(*blocks, strict=True))
    assert later.tolist() == list(range(1, 20_000))
    assert (earlier == 0).all() and (similarity == 1).all() and done.tolist() == [False, *done[1:]]


@pytest.mark.parametrize("rows_per_block", [3, 1 << 16])
@given(keys=st.lists(st.integers(0, 12), max_size=60))
def test_equal_keys_are_found_with_any_partition_size(rows_per_block, keys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "ROWS_PER_PARTITION", rows_per_block)
        patch.setattr(duplicates, "PAIRS_PER_BLOCK", rows_per_block)
        pairs = [*duplicates.exact_duplicates(np.array(keys, np.uint64))]
        distinct = duplicates.count_distinct(np.array(keys, np.uint64))
    matches = {int(a): int(b) for later, first in pairs for a, b in zip(later, first, strict=True)}
    assert matches == {n: keys.index(k) for n, k in enumerate(keys) if keys.index(k) < n}
    assert distinct == len(set(keys))
