"""The standard error of a paired difference, against what resampling the blocks gives."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.monitoring.uncertainty import paired_standard_error


def test_it_is_what_resampling_gives() -> None:
    random = np.random.default_rng(0)
    items = random.integers(20, 200, 200).astype(float)
    before = items * random.gamma(8, 0.3, 200)  # blocks differ much from each other
    after = before + items * random.normal(0.05, 0.02, 200)  # and little from before to after
    changes = []
    for _ in range(4000):
        chosen = random.integers(0, 200, 200)
        total = items[chosen].sum()
        changes.append((after[chosen].sum() - before[chosen].sum()) / total)
    error = paired_standard_error(before.tolist(), after.tolist(), items.tolist())
    assert error == pytest.approx(np.std(changes), rel=0.05)


@pytest.mark.parametrize("items", [[], [10.0], [10.0, 0.0]])
def test_one_block_tells_nothing(items) -> None:
    assert paired_standard_error([1.0] * len(items), [2.0] * len(items), items) is None


def test_an_equal_change_of_all_blocks_is_certain() -> None:
    assert paired_standard_error([1.0, 4.0], [3.0, 10.0], [1.0, 3.0]) == pytest.approx(0.0)
