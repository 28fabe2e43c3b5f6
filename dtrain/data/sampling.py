"""Several sources in one endless stream of rows: which row stands at which position.

Without weights, an epoch is one permutation of all rows of all sources. With weights, a pattern
of sources repeats, spread so evenly that no head of the stream is a whole row off its shares, and
the k-th row of a source in the stream is the k-th of that source's own permuted passes: each pass
holds each row once, wherever it ends. Weights may change at given positions; the passes go on.
All is pure arithmetic of (seed, position): there is no state to save or to share.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import lcm

import numpy as np
from numpy.typing import NDArray

from dtrain.core.errors import UserError
from dtrain.data.permutation import permute, stream_key

Int64s = NDArray[np.int64]

MAX_PATTERN = 1 << 12  # rows; weights that need more than this to come out even are rounded


@dataclass(frozen=True)
class SamplingPhase:
    """A part of the stream with the same shares all along.

    Attributes:
        start: its first position.
        quotas: rows of each source in the pattern.
    """

    start: int
    quotas: tuple[int, ...]

    @cached_property
    def pattern(self) -> Int64s:
        """[sum of the quotas]: the source of each place."""
        return even_pattern(self.quotas)

    @cached_property
    def before(self) -> Int64s:
        """[sum of the quotas]: rows of the same source before each place of the pattern."""
        out = np.empty_like(self.pattern)
        for source, quota in enumerate(self.quotas):
            out[self.pattern == source] = np.arange(quota)
        return out

    @property
    def shares(self) -> list[float]:
        """Of each source, of the sequences."""
        return [quota / sum(self.quotas) for quota in self.quotas]

    def counts(self, positions: int) -> Int64s:
        """[sources]: rows of each in the first `positions` of the phase."""
        turns, rest = divmod(positions, self.pattern.size)
        quotas = np.array(self.quotas)
        return turns * quotas + np.bincount(self.pattern[:rest], minlength=quotas.size)

    def position(self, source: int, use: int) -> int:
        """Where the phase has row `use` (from 0) of a source."""
        turns, rest = divmod(use, self.quotas[source])
        place = np.flatnonzero(self.pattern == source)[rest]
        return self.start + turns * self.pattern.size + int(place)


@dataclass(frozen=True)
class SamplingPlan:
    """Sources by their rows and, if weighted, their shares.

    Attributes:
        rows: rows of each source, none of them 0.
        phases: none for plain concatenation; else the first starts at 0.
        has_replay: the last source is replayed beside the others.
    """

    rows: tuple[int, ...]
    phases: tuple[SamplingPhase, ...] = ()
    has_replay: bool = False

    @cached_property
    def first_sequences(self) -> Int64s:
        """[sources + 1]: global number of the first row of each source, and of all rows."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    @cached_property
    def used(self) -> Int64s:
        """[phases, sources]: rows of each source that stand before each phase."""
        used = [np.zeros(len(self.rows), dtype=np.int64)]
        for phase, after in pairwise(self.phases):
            used.append(used[-1] + phase.counts(after.start - phase.start))
        return np.stack(used)

    @cached_property
    def sequences_per_epoch(self) -> int:
        """Positions of the first pass."""
        return self.sequences_in_epochs(1)

    def sequences_in_epochs(self, passes: float) -> int:
        """Positions until all rows, or those of the heaviest source, have come so many times.

        The heaviest at last, where weights change; what is replayed beside the others is not meant.
        """
        if not self.phases:
            return max(1, round(passes * int(self.first_sequences[-1])))
        own = range(len(self.rows) - self.has_replay)
        last = self.phases[-1].quotas
        source = max(own, key=lambda number: (last[number], self.rows[number]))
        use = max(1, round(passes * self.rows[source])) - 1
        used = self.used[:, source]
        phase = int(used.searchsorted(use, side="right")) - 1
        return self.phases[phase].position(source, use - int(used[phase])) + 1

    def sequence_ids_at(self, positions: Int64s, seed: int) -> Int64s:
        """Global row numbers [n] at `positions` [n] of the endless stream."""
        if not self.phases:
            total = int(self.first_sequences[-1])
            return permute(positions % total, total, stream_key(seed, "rows"), positions // total)
        source, use = self._uses(positions)
        out = np.empty_like(positions)
        for number, rows in enumerate(self.rows):
            here = source == number
            key = stream_key(seed, "source", number)
            row = permute(use[here] % rows, rows, key, use[here] // rows)
            out[here] = self.first_sequences[number] + row
        return out

    def _uses(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """The source [n] at each position, and how many of its rows [n] stand before."""
        source, use = np.empty_like(positions), np.empty_like(positions)
        starts = [phase.start for phase in self.phases]
        which = np.searchsorted(starts, positions, side="right") - 1
        for number in np.unique(which).tolist():
            here, phase = which == number, self.phases[number]
            turns, place = np.divmod(positions[here] - phase.start, phase.pattern.size)
            source[here] = found = phase.pattern[place]
            inside = turns * np.array(phase.quotas)[found] + phase.before[place]
            use[here] = self.used[number][found] + inside
        return source, use


def even_pattern(quotas: tuple[int, ...]) -> Int64s:
    """[sum of the quotas]: sources, such that each head of it holds their shares to under a row.

    The k-th row of a source is free from the place where its share exceeds k, and due where its
    share reaches k + 1; of those that are free, the one due first comes next (R. Tijdeman, "The
    chairman assignment problem", Discrete Mathematics 32, 1980).
    """
    size, used, out = sum(quotas), [0] * len(quotas), []
    for place in range(1, size + 1):
        free = [n for n, quota in enumerate(quotas) if used[n] * size < place * quota]
        source = min(free, key=lambda n: -(-(used[n] + 1) * size // quotas[n]))
        used[source] += 1
        out.append(source)
    return np.array(out, dtype=np.int64)


def mix(
    rows: list[int],
    weights: dict[int, list[float | None]],
    names: list[str],
    replay: float | None = None,
) -> SamplingPlan:
    """The mixture of sources with these numbers of rows and weights.

    Args:
        rows: rows of each source; with `replay`, of the replayed one behind them.
        weights: by the position from which they hold, rising from 0: the weight of each source, or
            None for all of them.
        names: what each source is called in a message.
        replay: share of the replayed source in all sequences. Sources without weights are one in
            the mixture then: an epoch holds each of their rows, and none again before all others.

    Raises:
        UserError: some sources have a weight and some have none, or a weight is too small.
    """
    if all(weight is None for weight in weights[0]):
        if replay is None:
            return SamplingPlan(tuple(rows))
        rows, names = [sum(rows[:-1]), rows[-1]], ["all sources", names[-1]]
        weights = {0: [1.0]}
    phases = [
        SamplingPhase(start, _quotas(given, names, replay)) for start, given in weights.items()
    ]
    return SamplingPlan(tuple(rows), tuple(phases), replay is not None)


def _quotas(weights: list[float | None], names: list[str], replay: float | None) -> tuple[int, ...]:
    bare = [name for name, weight in zip(names, weights, strict=False) if weight is None]
    if bare:
        raise UserError(
            f"some sources have a weight and some have none: {', '.join(bare)}",
            where="data.sources",
            fix="give each source a weight, or none of them",
        )
    exact = _with_replay([weight for weight in weights if weight is not None], replay)
    quotas = pattern_quotas(exact)
    lost = [name for name, q, w in zip(names, quotas, exact, strict=True) if w and not q]
    if lost:
        raise UserError(
            f"the weight of {lost[0]} is under one row in {sum(quotas)}",
            where="data.sources",
            fix="raise its weight, or leave the source out",
        )
    return quotas


def _with_replay(weights: list[float], share: float | None) -> list[Fraction]:
    exact = [Fraction(repr(weight)) for weight in weights]
    if share is None:
        return exact
    replayed = Fraction(repr(share))
    return [weight / sum(exact) * (1 - replayed) for weight in exact] + [replayed]


def pattern_quotas(weights: list[Fraction]) -> tuple[int, ...]:
    """Rows of each source in a pattern: exact where one of at most MAX_PATTERN rows can be.

    Else it has MAX_PATTERN rows, shared out by the largest remainder (Hamilton's method).
    """
    shares = [weight / sum(weights) for weight in weights]
    size = lcm(*(share.denominator for share in shares))
    if size <= MAX_PATTERN:
        return tuple(int(share * size) for share in shares)
    quotas = [int(share * MAX_PATTERN) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda i: (quotas[i] - shares[i] * MAX_PATTERN, i)
    )
    for number in by_remainder[: MAX_PATTERN - sum(quotas)]:
        quotas[number] += 1
    return tuple(quotas)
