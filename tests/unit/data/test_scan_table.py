"""What a scan keeps of millions of rows: the table, the places, and how equal keys are found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data_quality import duplicates
from dtrain.data_quality.table import ROOM, ROW, Places, Table

places = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=30
)


@given(st.lists(places, min_size=1, max_size=4))
def test_places_are_given_back(batches) -> None:
    kept = Places()
    for batch in batches:
        kept.add(np.array(batch))
    every = [place for batch in batches for place in batch]
    assert [kept.of(row) for row in range(len(every))] == every


def test_rows_that_follow_each_other_take_no_room() -> None:
    kept = Places()
    for start in range(0, 5000, 1000):
        numbers = np.arange(start, start + 1000)
        kept.add(np.column_stack([np.zeros(1000), np.zeros(1000), numbers]).astype(np.int64))
    assert kept.of(4321) == (0, 0, 4321) and kept.nbytes < 1000


def test_a_table_grows_and_keeps_its_rows() -> None:
    table = Table()
    for start in range(0, 3 * ROOM, 1000):
        rows = np.zeros(1000, ROW)
        rows["whole"] = np.arange(start, start + 1000)
        table.add(rows)
    assert (table.rows["whole"] == np.arange(len(table.rows))).all()
    assert len(table.rows) >= 3 * ROOM


@pytest.mark.parametrize("at_once", [3, 1 << 16])
@given(keys=st.lists(st.integers(0, 12), max_size=60))
def test_equal_keys_are_found_however_few_are_sorted_at_once(at_once, keys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "SORTED_AT_ONCE", at_once)
        patch.setattr(duplicates, "COMPARED_AT_ONCE", at_once)
        pairs = [*duplicates.exact(np.array(keys, np.uint64))]
        distinct = duplicates.distinct(np.array(keys, np.uint64))
    found = {int(a): int(b) for later, first in pairs for a, b in zip(later, first, strict=True)}
    assert found == {n: keys.index(k) for n, k in enumerate(keys) if keys.index(k) < n}
    assert distinct == len(set(keys))
