"""What a scan keeps of millions of rows: the table and the locations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data_quality.scan_result import GROWTH_ROWS, ROW, RowLocations, RowTable

LOCATIONS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=30
)


@given(st.lists(LOCATIONS, min_size=1, max_size=4))
def test_locations_are_returned_as_added(batches) -> None:
    locations = RowLocations()
    for batch in batches:
        locations.add(np.array(batch))
    expected = [location for batch in batches for location in batch]
    assert [locations[row] for row in range(len(expected))] == expected


def test_consecutive_lines_take_no_memory() -> None:
    locations = RowLocations()
    for start in range(0, 5000, 1000):
        indices = np.arange(start, start + 1000)
        locations.add(np.column_stack([np.zeros(1000), np.zeros(1000), indices]).astype(np.int64))
    assert locations[4321] == (0, 0, 4321) and locations.nbytes < 1000


def test_a_table_grows_and_keeps_its_rows() -> None:
    table = RowTable()
    for start in range(0, 3 * GROWTH_ROWS, 1000):
        rows = np.zeros(1000, ROW)
        rows["text"] = np.arange(start, start + 1000)
        table.add(rows)
    assert (table.rows["text"] == np.arange(len(table.rows))).all()
    assert len(table.rows) >= 3 * GROWTH_ROWS
