"""The order of several sources in one endless stream of sequences.

Without weights, an epoch is one permutation of all sequences of all sources. With weights, a
pattern of sources repeats, spread so evenly that no prefix of the stream is a whole sequence off
its shares; the k-th sequence of a source in the stream is the k-th of that source's own permuted
passes, so every pass contains each sequence once, wherever it ends. Weights may change at given
positions; the passes continue. All of it is arithmetic of (seed, position): there is no state to
save or to share.
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

MAX_PATTERN = 1 << 12  # sequences; weights that need more to come out even are rounded


@dataclass(frozen=True)
class SamplingPhase:
    """A range of the stream with constant shares.

    Attributes:
        start: its first position.
        quotas: sequences of each source in the pattern.
    """

    start: int
    quotas: tuple[int, ...]

    @cached_property
    def pattern(self) -> Int64s:
        """[sum of the quotas]: the source at each index."""
        return even_pattern(self.quotas)

    @cached_property
    def before(self) -> Int64s:
        """[sum of the quotas]: sequences of the same source before each index of the pattern."""
        counts = np.empty_like(self.pattern)
        for source, quota in enumerate(self.quotas):
            counts[self.pattern == source] = np.arange(quota)
        return counts

    @property
    def shares(self) -> list[float]:
        """Each source's share of the sequences."""
        return [quota / sum(self.quotas) for quota in self.quotas]

    def counts(self, positions: int) -> Int64s:
        """[sources]: sequences of each in the first `positions` of the phase."""
        repeats, rest = divmod(positions, self.pattern.size)
        quotas = np.array(self.quotas)
        return repeats * quotas + np.bincount(self.pattern[:rest], minlength=quotas.size)

    def position(self, source: int, use: int) -> int:
        """Position at which the phase has sequence `use` (from 0) of a source."""
        repeats, rest = divmod(use, self.quotas[source])
        index = np.flatnonzero(self.pattern == source)[rest]
        return self.start + repeats * self.pattern.size + int(index)


@dataclass(frozen=True)
class SamplingPlan:
    """Sources with their sizes and, if weighted, their shares.

    Attributes:
        sequences: of each source, at least 1.
        phases: none for a plain concatenation; otherwise the first starts at 0.
        has_replay: the last source is replayed into the others.
    """

    sequences: tuple[int, ...]
    phases: tuple[SamplingPhase, ...] = ()
    has_replay: bool = False

    @cached_property
    def first_sequences(self) -> Int64s:
        """[sources + 1]: id of the first sequence of each source, and the number of all."""
        return np.concatenate([[0], np.cumsum(self.sequences)]).astype(np.int64)

    @cached_property
    def used(self) -> Int64s:
        """[phases, sources]: sequences of each source before each phase."""
        used = [np.zeros(len(self.sequences), dtype=np.int64)]
        for phase, after in pairwise(self.phases):
            used.append(used[-1] + phase.counts(after.start - phase.start))
        return np.stack(used)

    @cached_property
    def sequences_per_epoch(self) -> int:
        """Positions of the first epoch."""
        return self.sequences_in_epochs(1)

    def sequences_in_epochs(self, epochs: float) -> int:
        """Positions until all sequences, or those of the heaviest source, came `epochs` times.

        Where weights change, the heaviest source is that of the last phase; replay never counts.
        """
        if not self.phases:
            return max(1, round(epochs * int(self.first_sequences[-1])))
        candidates = range(len(self.sequences) - self.has_replay)
        last = self.phases[-1].quotas
        source = max(candidates, key=lambda index: (last[index], self.sequences[index]))
        use = max(1, round(epochs * self.sequences[source])) - 1
        used = self.used[:, source]
        phase = int(used.searchsorted(use, side="right")) - 1
        return self.phases[phase].position(source, use - int(used[phase])) + 1

    def sequence_ids_at(self, positions: Int64s, seed: int) -> Int64s:
        """Sequence ids [n] at `positions` [n] of the endless stream."""
        if not self.phases:
            total = int(self.first_sequences[-1])
            return permute(positions % total, total, stream_key(seed, "rows"), positions // total)
        source, use = self._uses(positions)
        ids = np.empty_like(positions)
        for index, size in enumerate(self.sequences):
            here = source == index
            key = stream_key(seed, "source", index)
            local = permute(use[here] % size, size, key, use[here] // size)
            ids[here] = self.first_sequences[index] + local
        return ids

    def _uses(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """The source [n] at each position, and how many of its sequences [n] come before."""
        source, use = np.empty_like(positions), np.empty_like(positions)
        starts = [phase.start for phase in self.phases]
        phases = np.searchsorted(starts, positions, side="right") - 1
        for number in np.unique(phases).tolist():
            here, phase = phases == number, self.phases[number]
            repeats, index = np.divmod(positions[here] - phase.start, phase.pattern.size)
            source[here] = chosen = phase.pattern[index]
            inside = repeats * np.array(phase.quotas)[chosen] + phase.before[index]
            use[here] = self.used[number][chosen] + inside
        return source, use


def even_pattern(quotas: tuple[int, ...]) -> Int64s:
    """[sum of the quotas]: sources, such that every prefix is within one of their shares.

    The k-th sequence of a source is released where its share exceeds k and due where its share
    reaches k + 1; of those released, the one due first comes next (R. Tijdeman, "The chairman
    assignment problem", Discrete Mathematics 32, 1980).
    """
    size, used, pattern = sum(quotas), [0] * len(quotas), []
    for length in range(1, size + 1):
        released = [n for n, quota in enumerate(quotas) if used[n] * size < length * quota]
        source = min(released, key=lambda n: -(-(used[n] + 1) * size // quotas[n]))
        used[source] += 1
        pattern.append(source)
    return np.array(pattern, dtype=np.int64)


def build_sampling_plan(
    sequences: list[int],
    weights: dict[int, list[float | None]],
    names: list[str],
    replay: float | None = None,
) -> SamplingPlan:
    """Plan the stream of sources of these sizes and weights.

    Args:
        sequences: of each source; with `replay`, of the replayed one at the end.
        weights: by the position from which they hold, ascending from 0: the weight of each source,
            or None for all of them.
        names: name of each source in messages.
        replay: share of the replayed source in all sequences. Sources without weights then count
            as one source: an epoch has each of their sequences once.

    Raises:
        UserError: only some sources have a weight, or a weight is too small.
    """
    if all(weight is None for weight in weights[0]):
        if replay is None:
            return SamplingPlan(tuple(sequences))
        sequences = [sum(sequences[:-1]), sequences[-1]]
        names, weights = ["all sources", names[-1]], {0: [1.0]}
    phases = [
        SamplingPhase(start, _quotas(by_source, names, replay))
        for start, by_source in weights.items()
    ]
    return SamplingPlan(tuple(sequences), tuple(phases), replay is not None)


def _quotas(weights: list[float | None], names: list[str], replay: float | None) -> tuple[int, ...]:
    missing = [name for name, weight in zip(names, weights, strict=False) if weight is None]
    if missing:
        raise UserError(
            f"some sources have a weight and some have none: {', '.join(missing)}",
            where="data.sources",
            fix="give each source a weight, or none of them",
        )
    exact = _with_replay([weight for weight in weights if weight is not None], replay)
    quotas = pattern_quotas(exact)
    lost = [name for name, q, w in zip(names, quotas, exact, strict=True) if w and not q]
    if lost:
        raise UserError(
            f"the weight of {lost[0]} is less than one sequence in {sum(quotas)}",
            where="data.sources",
            fix="raise its weight, or remove the source",
        )
    return quotas


def _with_replay(weights: list[float], replay: float | None) -> list[Fraction]:
    exact = [Fraction(repr(weight)) for weight in weights]
    if replay is None:
        return exact
    share = Fraction(repr(replay))
    return [weight / sum(exact) * (1 - share) for weight in exact] + [share]


def pattern_quotas(weights: list[Fraction]) -> tuple[int, ...]:
    """Sequences of each source in a pattern: exact if MAX_PATTERN sequences suffice.

    Otherwise the pattern has MAX_PATTERN sequences, apportioned by the largest remainder
    (Hamilton's method).
    """
    shares = [weight / sum(weights) for weight in weights]
    size = lcm(*(share.denominator for share in shares))
    if size <= MAX_PATTERN:
        return tuple(int(share * size) for share in shares)
    quotas = [int(share * MAX_PATTERN) for share in shares]
    by_remainder = sorted(
        range(len(shares)), key=lambda i: (quotas[i] - shares[i] * MAX_PATTERN, i)
    )
    for index in by_remainder[: MAX_PATTERN - sum(quotas)]:
        quotas[index] += 1
    return tuple(quotas)
