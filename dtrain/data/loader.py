"""Rows into the tensors of a micro-batch, for any rank of any number of ranks.

The state of the loader is the step number: what a step holds follows from the mixture and the seed.
Shapes: T tokens of a micro-batch, K targets in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.mixture import Mixture

Int64s = NDArray[np.int64]

NO_ROW = -1
ORDER_AHEAD = 1 << 14  # rows whose numbers are worked out at once
ROWS_AHEAD = 1024  # rows of a rank that are looked up at once


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that a rank computes at once, one after the other, never padded.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], from 0 in each document.
        predict: int64 [K], places whose next token is a target of the same document.
        targets: int64 [K], those next tokens.
        document_lengths: tokens of each document, sum T.
        sequences: place of each sequence in the endless stream.
        sequence_lengths: tokens of each sequence, sum T.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    document_lengths: list[int]
    sequences: list[int]
    sequence_lengths: list[int]


class Loader:
    """The batches of a stage."""

    def __init__(self, mixture: Mixture, *, seed: int, global_batch: int, total_rows: int) -> None:
        """Lay `total_rows` rows of the stream out in steps.

        Args:
            mixture: prepared data.
            seed: of the recipe.
            global_batch: rows of a step, over all ranks.
            total_rows: rows of the whole stage; the last step may be short.
        """
        self.mixture, self.seed = mixture, seed
        self.global_batch, self.total_rows = global_batch, total_rows
        self._order = Ahead(max(1, ORDER_AHEAD // global_batch))
        self._rows = np.empty((0, global_batch), dtype=np.int64)
        self._plans: dict[tuple[int, int], _Plan] = {}

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return -(-self.total_rows // self.global_batch)

    def batch(self, step: int) -> Int64s:
        """Row numbers [global_batch] of a step; NO_ROW fills a short last one."""
        if steps := self._order.wanted(step):
            self._rows = self._batches(step, min(steps, max(1, self.steps - step)))
            self._order.stop = step + len(self._rows)
        return self._rows[step - self._order.first]

    def _batches(self, step: int, steps: int) -> Int64s:
        """Row numbers [steps, global_batch] of some steps."""
        start = step * self.global_batch
        stop = min(start + steps * self.global_batch, self.total_rows)
        rows = np.full(steps * self.global_batch, NO_ROW, dtype=np.int64)
        rows[: max(0, stop - start)] = self.mixture.rows_at(start, stop, self.seed)
        return rows.reshape(steps, self.global_batch)

    def supervised_tokens(self, step: int) -> int:
        """Targets in the global batch: what the step's loss is divided by."""
        return int(self.mixture.supervised_tokens(self._real(step)).sum())

    def tokens(self, step: int) -> int:
        """Tokens in the global batch."""
        return int(self.mixture.tokens(self._real(step)).sum())

    @property
    def source_names(self) -> list[str]:
        """Names of the sources."""
        return self.mixture.names

    def target_sources(self, step: int, batch: MicroBatch) -> Int64s:
        """Number of the source of each target [K] of a micro-batch of a step."""
        places = np.array(batch.sequences) - step * self.global_batch
        sources = self.mixture.sources_of(self.batch(step)[places])
        ends = np.cumsum(batch.sequence_lengths)
        return sources[ends.searchsorted(batch.predict.numpy(), side="right")]

    def tokens_by_source(self, step: int) -> dict[str, dict[str, int]]:
        """What each of several sources gives to the global batch; nothing to tell of one."""
        if len(self.mixture.sources) == 1:
            return {}
        return self.mixture.tokens_by_source(self._real(step))

    def micro_batches(
        self, step: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator[MicroBatch]:
        """What `rank` computes in a step; all ranks get the same number of micro-batches.

        Args:
            step: from 0.
            rank: 0 … ranks - 1.
            ranks: how many share the global batch; each takes a contiguous slice of it.
            micro_batch: sequences at once.
        """
        share = -(-self.global_batch // ranks)
        plan = self._plan(step, rank, share)
        for start in range(0, share, micro_batch):
            place = step * self.global_batch + rank * share + start
            yield plan.micro_batch(step, start, min(start + micro_batch, share), place)

    def _plan(self, step: int, rank: int, share: int) -> _Plan:
        most = min(ROWS_AHEAD // share, ORDER_AHEAD // self.global_batch)
        plan = self._plans.get((rank, share)) or _Plan(max(1, most))
        if steps := plan.ahead.wanted(step):
            self.batch(step)  # the order is worked out as far as the plan may go
            stop = plan.ahead.stop = min(step + steps, self._order.stop)
            rows = self._rows[step - self._order.first : stop - self._order.first]
            plan.fill(self.mixture, list(rows[:, rank * share : (rank + 1) * share]))
        self._plans = {(rank, share): plan}
        return plan

    def _real(self, step: int) -> Int64s:
        rows = self.batch(step)
        return rows[rows != NO_ROW]


class Ahead:
    """How many steps to work out at once: one after a jump, then four times as many each time."""

    def __init__(self, most: int) -> None:
        self.first, self.stop, self.most = 0, 0, most

    def wanted(self, step: int) -> int:
        """0 if `step` is worked out already; else steps to work out from it on."""
        if self.first <= step < self.stop:
            return 0
        goes_on = step == self.stop and self.stop > self.first
        size = min(4 * (self.stop - self.first), self.most) if goes_on else 1
        self.first, self.stop = step, step + size
        return size


class _Plan:
    """Where the tokens of a rank's rows lie, some steps ahead.

    What is asked for row by row is held in lists. Tokens are counted from the first row of the
    plan on, and so are targets.
    """

    def __init__(self, most_steps: int) -> None:
        self.ahead = Ahead(most_steps)

    def fill(self, mixture: Mixture, steps: list[Int64s]) -> None:
        """Look up the rows of these steps."""
        real = [rows[rows != NO_ROW] for rows in steps]
        pieces = mixture.gather(np.concatenate(real))
        rows = np.arange(sum(len(part) for part in real) + 1)
        self.views = pieces.views
        self.sizes = pieces.sizes
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.counts = pieces.run_stops - pieces.run_starts
        before = np.concatenate([[0], np.cumsum(self.counts)])
        # What to add to a target's number for the place that predicts it.
        self.shifts = self.starts[pieces.run_pieces] + pieces.run_starts - 1 - before[:-1]
        first_pieces = pieces.rows.searchsorted(rows)
        runs = pieces.run_pieces.searchsorted(first_pieces)
        self.first_rows = np.cumsum([0, *(len(part) for part in real)]).tolist()
        self.pieces, self.runs = first_pieces.tolist(), runs.tolist()
        self.tokens, self.targets = self.starts[first_pieces].tolist(), before[runs].tolist()

    def micro_batch(self, step: int, start: int, stop: int, place: int) -> MicroBatch:
        """The rank's rows `start` … `stop` - 1 in a step, the first at `place` of the stream."""
        low, high = self.first_rows[step - self.ahead.first :][:2]
        first, last = min(low + start, high), min(low + stop, high)
        if first == last:
            return _nothing(place)
        base, pieces = self.tokens[first], slice(self.pieces[first], self.pieces[last])
        before, runs = self.targets[first], slice(self.runs[first], self.runs[last])
        numbers = _numbers(self.tokens[last] - base)
        ids = np.concatenate(self.views[pieces], dtype=np.int64)
        sizes = self.sizes[pieces]
        positions = np.repeat(self.starts[pieces] - base, sizes)
        np.subtract(numbers[: ids.size], positions, out=positions)
        predict = np.repeat(self.shifts[runs] + (before - base), self.counts[runs])
        predict += numbers[: predict.size]
        return MicroBatch(
            torch.from_numpy(ids)[None],
            torch.from_numpy(positions)[None],
            torch.from_numpy(predict),
            torch.from_numpy(ids[1:].take(predict)),
            sizes.tolist(),
            list(range(place, place + last - first)),
            [self.tokens[row + 1] - self.tokens[row] for row in range(first, last)],
        )


@lru_cache(maxsize=1)
def _counted(size: int) -> Int64s:
    return np.arange(size, dtype=np.int64)


def _numbers(count: int) -> Int64s:
    """0, 1, …, at least `count` of them."""
    return _counted(1 << (count - 1).bit_length())


def _nothing(position: int) -> MicroBatch:
    """One token and no target: a rank without rows still takes part in every collective."""
    token, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return MicroBatch(token, token.clone(), none, none.clone(), [1], [position], [1])
