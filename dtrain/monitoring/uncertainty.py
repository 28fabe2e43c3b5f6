"""How far a difference of two losses may be chance: of the rows, or of the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, pi, sqrt
from typing import Any

from dtrain.core.lazy_import import LazyModule

np: Any = LazyModule("numpy")  # `dtrain check` reads this module without it

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


SIGNIFICANT = 0.05  # of p: below it a difference counts as real
INTERVALS = 2000  # of Simpson's rule


@dataclass(frozen=True)
class MeanDifference:
    """The difference of two means, over runs that differ only by their seeds.

    Attributes:
        value: the second mean minus the first.
        standard_error: of it.
        p: probability of a difference at least as large by chance; two-sided.
        is_paired: whether runs with the same seed were compared with each other.
    """

    value: float
    standard_error: float
    p: float
    is_paired: bool

    @property
    def is_noise(self) -> bool:
        """Whether the difference may well be chance."""
        return self.p >= SIGNIFICANT

    def __str__(self) -> str:
        test = "paired t-test" if self.is_paired else "Welch's t-test"
        verdict = "may be noise" if self.is_noise else "not noise"
        figures = f"{self.value:+.4f} ± {self.standard_error:.4f}"
        return f"{figures}, {verdict} (p = {self.p:.2g}, {test} over seeds)"


def compare_means(
    before: Sequence[float], after: Sequence[float], *, is_paired: bool
) -> MeanDifference:
    """Test whether two means differ: Student's paired t-test, or Welch's for unpaired runs.

    Welch, "The generalization of 'Student's' problem when several different population variances
    are involved", Biometrika 34 (1947), with the Welch-Satterthwaite degrees of freedom.

    Args:
        before, after: at least two values each; of equal length if paired, seed by seed.
    """
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if is_paired:
        error, freedom = sqrt(float((b - a).var(ddof=1)) / len(a)), float(len(a) - 1)
    else:
        terms = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
        error = sqrt(sum(terms))
        weights = sum(t**2 / (len(x) - 1) for t, x in zip(terms, (a, b), strict=True))
        freedom = sum(terms) ** 2 / weights if weights else 1.0
    difference = float(b.mean() - a.mean())
    if error == 0.0:
        p = 1.0 if difference == 0.0 else 0.0
    else:
        p = _two_sided_p(abs(difference) / error, freedom)
    return MeanDifference(difference, error, p, is_paired)


def _two_sided_p(t: float, freedom: float) -> float:
    """P(|T| ≥ t) of Student's t distribution, by Simpson's rule over the angle of its tail.

    With T = √ν·tan θ the density becomes cos(θ)^(ν - 1), which is smooth on a finite interval
    (Abramowitz and Stegun, Handbook of Mathematical Functions, section 26.7).
    """
    start = atan(t / sqrt(freedom))
    tail = _simpson(start, freedom)
    return min(1.0, tail / _simpson(0.0, freedom))


def _simpson(start: float, freedom: float) -> float:
    angles = np.linspace(start, pi / 2, INTERVALS + 1)
    heights = np.clip(np.cos(angles), 0.0, 1.0) ** (freedom - 1)
    weights = np.ones(INTERVALS + 1)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return float(weights @ heights) * (pi / 2 - start) / INTERVALS / 3
