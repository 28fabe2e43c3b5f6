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
    """

    rows: tuple[int, ...]
    quotas: tuple[int, ...] | None

    @cached_property
    def first_rows(self) -> Int64s:
        """[sources + 1]: global number of the first row of each source, and of all rows."""
        return np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)

    @cached_property
    def rows_per_epoch(self) -> int:
        """All rows, or positions until the heaviest source has been passed once, rounded up."""
        if self.quotas is None:
            return int(self.first_rows[-1])
        heaviest = max(range(len(self.rows)), key=lambda i: (self.quotas[i], self.rows[i]))  # type: ignore[index]
        return -(-self.rows[heaviest] * sum(self.quotas) // self.quotas[heaviest])

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
        use = block * np.asarray(quotas)[source] + slot - first_slots[source]
        out = np.empty_like(positions)
        for number, rows in enumerate(self.rows):
            here = source == number
            key = stream_key(seed, "source", number)
            row = permute(use[here] % rows, rows, key, use[here] // rows)
            out[here] = self.first_rows[number] + row
        return out


def mix(rows: list[int], weights: list[float | None], names: list[str]) -> Mix:
    """The mixture of sources with these numbers of rows and weights.

    Args:
        rows: rows of each source.
        weights: weight of each source, or None for all of them.
        names: what each source is called in a message.

    Raises:
        UserError: some sources have a weight and some have none, or a weight is too small.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return Mix(tuple(rows), None)
    if len(given) < len(weights):
        bare = ", ".join(n for n, weight in zip(names, weights, strict=True) if weight is None)
        raise UserError(
            f"some sources have a weight and some have none: {bare}",
            where="data.sources",
            fix="give each source a weight, or none of them",
        )
    quotas = block_quotas(given)
    if 0 in quotas:
        raise UserError(
            f"the weight of {names[quotas.index(0)]} is under one row in {sum(quotas)}",
            where="data.sources",
            fix="raise its weight, or leave the source out",
        )
    return Mix(tuple(rows), quotas)


def block_quotas(weights: list[float]) -> tuple[int, ...]:
    """Slots of each source in a block: exact where a block of at most MAX_BLOCK rows can be.

    Else a block has MAX_BLOCK slots, shared out by the largest remainder (Hamilton's method).
    """
    shares = [Fraction(repr(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    block = lcm(*(share.denominator for share in shares))
    if block <= MAX_BLOCK:
        return tuple(int(share * block) for share in shares)
    quotas = [int(share * MAX_BLOCK) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (quotas[i] - shares[i] * MAX_BLOCK, i))
    for number in by_remainder[: MAX_BLOCK - sum(quotas)]:
        quotas[number] += 1
    return tuple(quotas)
