"""How far a difference of two held-out losses may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

CERTAIN = 1.645  # standard errors; a larger difference is chance in at most 5 % of sets of rows


def paired_standard_error(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float]
) -> float | None:
    """Standard error of the difference of two mean losses over the same rows.

    The rows are in blocks. The means are ratios of sums, so this is the linearized variance of a
    ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4) of the paired differences.

    Args:
        before, after: summed losses of each block [B].
        weights: what the sums are divided by, of each block [B].

    Returns:
        None with fewer than two blocks that have a weight.
    """
    counts = np.asarray(weights, dtype=np.float64)
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    used = counts > 0
    blocks, total = int(used.sum()), float(counts.sum())
    if blocks < 2:
        return None
    residuals = (differences - differences.sum() / total * counts)[used]
    return sqrt(blocks / (blocks - 1) * float(residuals @ residuals)) / total
