"""The permutation is a bijection for any number of items, and depends on every part of its key."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.permutation import MAX_ITEMS, permute, stream_key

keys = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**40)


@given(st.integers(1, 3000), keys, epochs)
def test_every_index_occurs_once(n: int, key: int, epoch: int) -> None:
    assert sorted(permute(np.arange(n), n, key, epoch).tolist()) == list(range(n))


@settings(max_examples=50)
@given(st.integers(2**40, MAX_ITEMS), keys, st.integers(0, 2**40 - 300))
def test_huge_permutations_have_no_collisions(n: int, key: int, start: int) -> None:
    out = permute(np.arange(start, start + 300), n, key, 0)
    assert out.min() >= 0 and out.max() < n
    assert len(set(out.tolist())) == 300


@given(st.lists(epochs, min_size=1, max_size=20), keys)
def test_epochs_in_one_call_equal_separate_calls(many: list[int], key: int) -> None:
    index = np.arange(len(many)) % 7
    together = permute(index, 7, key, np.array(many))
    alone = [int(permute(index[i : i + 1], 7, key, epoch)[0]) for i, epoch in enumerate(many)]
    assert together.tolist() == alone


def test_seed_epoch_and_label_each_change_the_order() -> None:
    index = np.arange(1000)
    first = permute(index, 1000, stream_key(1, "rows"), 0)
    for changed in (
        permute(index, 1000, stream_key(2, "rows"), 0),
        permute(index, 1000, stream_key(1, "slots"), 0),
        permute(index, 1000, stream_key(1, "rows"), 1),
    ):
        assert (first == changed).sum() < 12  # one in a thousand agrees by chance
    assert abs(np.corrcoef(index, first)[0, 1]) < 0.15


def test_the_order_of_a_seed_never_changes() -> None:
    """Runs that are resumed by a later version must see the same rows."""
    out = permute(np.arange(10), 10, stream_key(0, "rows"), 0)
    assert out.tolist() == [2, 5, 0, 4, 1, 9, 8, 7, 6, 3]
    far = permute(np.arange(10**11, 10**11 + 3), 10**12, stream_key(7, "rows"), 5)
    assert far.tolist() == [640414633101, 547604756908, 905078908246]
