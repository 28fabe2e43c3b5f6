"""Several sources in one endless stream of rows: which row stands at which position.

Without weights, an epoch is one permutation of all rows of all sources. With weights, the stream
is cut into blocks; each source has a fixed number of slots in a block, the slots are permuted
block by block, and the k-th slot of a source holds the k-th row of that source's own permuted
passes. Both are pure arithmetic of (seed, position): there is no state to save or to share.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np
from numpy.typing import NDArray

from dtrain.core.errors import UserError
from dtrain.data.order import permute, stream_key

Int64s = NDArray[np.int64]

MAX_BLOCK = 1024  # rows; weights that need more than this to come out even are rounded


@dataclass(frozen=True)
class Mix:
    """Sources by their rows and, if weighted, their slots in a block.

    Attributes:
        rows: rows of each source, none of them 0.
        quotas: slots of each source in a block, or None for plain concatenation.
        in_turn: the last source is replayed beside the others, and a source's rows come in the
            order of its passes inside a block too, so that a pass may end anywhere in it and
            still holds each row once.
    """

    rows: tuple[int, ...]
    quotas: tuple[int, ...] | None
    in_turn: bool = False

    @cached_property
    def first_rows(self) -> Int64s:
        """[sources + 1]: global number of the first row of each source, and of all rows."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    @cached_property
    def rows_per_epoch(self) -> int:
        """All rows, or positions until the heaviest source has been passed once, rounded up.

        In turn, the last source is replayed beside the others: it is never the heaviest, and of the
        last block there is as much as it takes for the rows that are left, whatever the seed.
        """
        if self.quotas is None:
            return int(self.first_rows[-1])
        own = len(self.rows) - self.in_turn
        quota, rows = max(zip(self.quotas[:own], self.rows[:own], strict=True))
        size = sum(self.quotas)
        if not self.in_turn:
            return -(-rows * size // quota)
        blocks, left = divmod(rows, quota)
        return blocks * size + (size - quota + left if left else 0)

    def rows_at(self, positions: Int64s, seed: int) -> Int64s:
        """Global row numbers [n] at `positions` [n] of the endless stream."""
        if self.quotas is None:
            total = int(self.first_rows[-1])
            return permute(positions % total, total, stream_key(seed, "rows"), positions // total)
        return self._weighted(positions, seed, self.quotas)

    def _weighted(self, positions: Int64s, seed: int, quotas: tuple[int, ...]) -> Int64s:
        size = sum(quotas)
        block = positions // size
        slot = permute(positions % size, size, stream_key(seed, "slots"), block)
        first_slots = np.concatenate([[0], np.cumsum(quotas)]).astype(np.int64)
        source = np.searchsorted(first_slots, slot, side="right") - 1
        inside = slot - first_slots[source]
        if self.in_turn:
            inside = self._turns(positions, seed, first_slots)
        use = block * np.asarray(quotas)[source] + inside
        out = np.empty_like(positions)
        for number, rows in enumerate(self.rows):
            here = source == number
            key = stream_key(seed, "source", number)
            row = permute(use[here] % rows, rows, key, use[here] // rows)
            out[here] = self.first_rows[number] + row
        return out

    def _turns(self, positions: Int64s, seed: int, first_slots: Int64s) -> Int64s:
        """How many positions of the same source each one [n] has before it in its block."""
        size = int(first_slots[-1])
        blocks, which = np.unique(positions // size, return_inverse=True)
        places = np.tile(np.arange(size), (blocks.size, 1))
        slots = permute(
            places.reshape(-1), size, stream_key(seed, "slots"), np.repeat(blocks, size)
        )
        source = np.searchsorted(first_slots, slots, side="right").reshape(places.shape)
        order = np.argsort(source, axis=1, kind="stable")  # of each block: source by source
        turns = np.empty_like(order)
        sources = np.take_along_axis(source, order, axis=1) - 1
        np.put_along_axis(turns, order, places - first_slots[sources], axis=1)
        found: Int64s = turns[which.reshape(-1), positions % size]
        return found


def mix(
    rows: list[int], weights: list[float | None], names: list[str], replay: float | None = None
) -> Mix:
    """The mixture of sources with these numbers of rows and weights.

    Args:
        rows: rows of each source; with `replay`, of the replayed one behind them.
        weights: weight of each source, or None for all of them.
        names: what each source is called in a message.
        replay: share of the replayed source in all sequences. Sources without weights are one in
            the mixture then: an epoch holds each of their rows, and none again before all others.

    Raises:
        UserError: some sources have a weight and some have none, or a weight is too small.
    """
    given = [weight for weight in weights if weight is not None]
    if not given and replay is None:
        return Mix(tuple(rows), None)
    if not given:
        rows, weights, names = [sum(rows[:-1]), rows[-1]], [1.0], ["all sources", names[-1]]
        given = [1.0]
    if len(given) < len(weights):
        bare = ", ".join(n for n, weight in zip(names, weights, strict=False) if weight is None)
        raise UserError(
            f"some sources have a weight and some have none: {bare}",
            where="data.sources",
            fix="give each source a weight, or none of them",
        )
    quotas = block_quotas(_with_replay(given, replay))
    if 0 in quotas:
        raise UserError(
            f"the weight of {names[quotas.index(0)]} is under one row in {sum(quotas)}",
            where="data.sources",
            fix="raise its weight, or leave the source out",
        )
    return Mix(tuple(rows), quotas, in_turn=replay is not None)


def _with_replay(weights: list[float], share: float | None) -> list[Fraction]:
    exact = [Fraction(repr(weight)) for weight in weights]
    if share is None:
        return exact
    replayed = Fraction(repr(share))
    return [weight / sum(exact) * (1 - replayed) for weight in exact] + [replayed]


def block_quotas(weights: list[Fraction]) -> tuple[int, ...]:
    """Slots of each source in a block: exact where a block of at most MAX_BLOCK rows can be.

    Else a block has MAX_BLOCK slots, shared out by the largest remainder (Hamilton's method).
    """
    shares = [weight / sum(weights) for weight in weights]
    block = lcm(*(share.denominator for share in shares))
    if block <= MAX_BLOCK:
        return tuple(int(share * block) for share in shares)
    quotas = [int(share * MAX_BLOCK) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i] * MAX_BLOCK, i))
    for number in by_remainder[: MAX_BLOCK - sum(quotas)]:
        quotas[number] += 1
    return tuple(quotas)
