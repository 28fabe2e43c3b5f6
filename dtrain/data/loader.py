"""Rows into the tensors of a micro-batch, for any rank of any number of ranks.

The state of the loader is the step number: what a step holds follows from the mixture and the seed.
Shapes: T tokens of a micro-batch, K targets in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.mixture import Mixture, Row

Int64s = NDArray[np.int64]

NO_ROW = -1


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

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return -(-self.total_rows // self.global_batch)

    def batch(self, step: int) -> Int64s:
        """Row numbers [global_batch] of a step; NO_ROW fills a short last one."""
        start = step * self.global_batch
        stop = min(start + self.global_batch, self.total_rows)
        rows = np.full(self.global_batch, NO_ROW, dtype=np.int64)
        rows[: stop - start] = self.mixture.rows_at(start, stop, self.seed)
        return rows

    def supervised_tokens(self, step: int) -> int:
        """Targets in the global batch: what the step's loss is divided by."""
        return int(self.mixture.supervised_tokens(self._real(step)).sum())

    def tokens(self, step: int) -> int:
        """Tokens in the global batch."""
        return int(self.mixture.tokens(self._real(step)).sum())

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
        rows = self.batch(step)
        for start in range(rank * share, (rank + 1) * share, micro_batch):
            stop = min(start + micro_batch, (rank + 1) * share)
            yield self._micro_batch(rows[start:stop], step * self.global_batch + start)

    def _real(self, step: int) -> Int64s:
        rows = self.batch(step)
        return rows[rows != NO_ROW]

    def _micro_batch(self, numbers: Int64s, position: int) -> MicroBatch:
        places = [position + i for i, number in enumerate(numbers) if number != NO_ROW]
        rows = [self.mixture.row(int(number)) for number in numbers if number != NO_ROW]
        return _assemble(rows, places) if rows else _nothing(position)


def _assemble(rows: list[Row], places: list[int]) -> MicroBatch:
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    supervised = np.concatenate([row.supervised for row in rows])
    lengths = np.concatenate([row.lengths for row in rows]).astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(ids.size, dtype=np.int64) - np.repeat(starts, lengths)
    predicted = np.flatnonzero(supervised)  # never the first token of a document
    return MicroBatch(
        torch.from_numpy(ids)[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(predicted - 1),
        torch.from_numpy(ids[predicted]),
        lengths.tolist(),
        places,
        [row.input_ids.size for row in rows],
    )


def _nothing(position: int) -> MicroBatch:
    """One token and no target: a rank without rows still takes part in every collective."""
    token, none = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return MicroBatch(token, token.clone(), none, none.clone(), [1], [position], [1])
