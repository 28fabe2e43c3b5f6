"""Rows into the tensors of a micro-batch, for any rank of any number of ranks.

The state of the loader is the step number: what a step holds follows from the mixture and the seed.
Shapes: T tokens of a micro-batch, K targets in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.packed_dataset import BatchCounts, PackedDataset
from dtrain.distributed.memory import send

__all__ = ["BatchCounts", "Loader", "MicroBatch"]

Int64s = NDArray[np.int64]

NO_SEQUENCE = -1
ORDER_AHEAD = 1 << 14  # rows whose numbers are worked out at once


def _no_numbers() -> Int64s:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that a rank computes at once, one after the other, never padded.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], from 0 in each document; none for one document alone.
        predict: int64 [K], places whose next token is a target of the same document.
        targets: int64 [K], those next tokens.
        document_lengths: tokens of each document, sum T.
        sequences: place of each sequence in the endless stream.
        sequence_lengths: tokens of each sequence, sum T.
        sequence_ids: number of each sequence in the dataset, whatever the order of training.
        document_ids: number of each document in the dataset, [D]. The documents of one row follow
            one another.
        labels: of each document, as its row encoder set it, [D].
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    target_positions: torch.Tensor
    targets: torch.Tensor
    document_lengths: list[int]
    sequences: list[int]
    sequence_lengths: list[int]
    sequence_ids: list[int] = field(default_factory=list)
    document_ids: Int64s = field(default_factory=_no_numbers)
    labels: Int64s = field(default_factory=_no_numbers)

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch with its tensors on `device`."""
        if device.type == "cpu":
            return self
        tensors: dict[str, Any] = {
            name: send(value, device)
            for name, value in vars(self).items()
            if torch.is_tensor(value)
        }
        return replace(self, **tensors)


class Loader:
    """The batches of a stage."""

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        seed: int,
        global_batch: int,
        total_sequences: int,
        alone: bool = False,
    ) -> None:
        """Lay `total_rows` rows of the stream out in steps.

        Args:
            mixture: prepared data.
            seed: of the recipe.
            global_batch: rows of a step, over all ranks.
            total_rows: rows of the whole stage; the last step may be short.
            alone: the model computes one document at once, so that each row holds one, and each
                micro-batch one row.
        """
        self.dataset, self.seed = dataset, seed
        self.global_batch, self.total_sequences, self.alone = global_batch, total_sequences, alone
        self._order = OrderCache(max(1, ORDER_AHEAD // global_batch))
        self._rows = np.empty((0, global_batch), dtype=np.int64)

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return -(-self.total_sequences // self.global_batch)

    def batch(self, step: int) -> Int64s:
        """Row numbers [global_batch] of a step; NO_ROW fills a short last one."""
        if steps := self._order.wanted(step):
            self._rows = self._batches(step, min(steps, max(1, self.steps - step)))
            self._order.stop = step + len(self._rows)
        return self._rows[step - self._order.first]

    def _batches(self, step: int, steps: int) -> Int64s:
        """Row numbers [steps, global_batch] of some steps."""
        start = step * self.global_batch
        stop = min(start + steps * self.global_batch, self.total_sequences)
        rows = np.full(steps * self.global_batch, NO_SEQUENCE, dtype=np.int64)
        rows[: max(0, stop - start)] = self.dataset.sequence_ids_at(start, stop, self.seed)
        return rows.reshape(steps, self.global_batch)

    def counts(self, step: int) -> BatchCounts:
        """What the global batch holds, over all ranks."""
        return self.dataset.counts(self._real(step))

    @property
    def source_names(self) -> list[str]:
        """Names of the sources."""
        return self.dataset.names

    def sources_at(self, step: int, batch: MicroBatch, positions: Int64s) -> Int64s:
        """Number of the source of each of these token positions [n] in a micro-batch of a step."""
        places = np.array(batch.sequences) - step * self.global_batch
        sources = self.dataset.sources_of(self.batch(step)[places])
        ends = np.cumsum(batch.sequence_lengths)
        return sources[ends.searchsorted(positions, side="right")]

    def counts_by_source(self, step: int) -> dict[str, BatchCounts]:
        """What each source contributes to the global batch."""
        return self.dataset.counts_by_source(self._real(step))

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
        assert micro_batch == 1 or not self.alone
        share = -(-self.global_batch // ranks)
        mine = self.batch(step)[rank * share : (rank + 1) * share]
        mine = mine if step + 1 < self.steps else mine[mine != NO_SEQUENCE]
        place = step * self.global_batch + rank * share
        for start in range(0, share, micro_batch):
            yield self._micro_batch(mine[start : start + micro_batch], place + start)

    def _micro_batch(self, rows: Int64s, place: int) -> MicroBatch:
        """These rows, the first at `place` of the stream."""
        if not rows.size:
            return _nothing(place, alone=self.alone)
        made = self.dataset.read(rows)
        assert len(made.lengths) == 1 or not self.alone
        return MicroBatch(
            torch.from_numpy(made.ids),
            None if self.alone else torch.from_numpy(made.positions),
            torch.from_numpy(made.target_positions),
            torch.from_numpy(made.targets),
            made.lengths,
            list(range(place, place + len(rows))),
            made.sequence_tokens,
            rows.tolist(),
            made.documents,
            made.labels,
        )

    def _real(self, step: int) -> Int64s:
        rows = self.batch(step)
        return rows[rows != NO_SEQUENCE]


class OrderCache:
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


def _nothing(position: int, *, alone: bool) -> MicroBatch:
    """Two tokens and no target: a rank without rows still takes part in every collective.

    Of one token, GPUs would compile their kernels again, on this rank alone.
    """
    none = torch.zeros(0, dtype=torch.int64)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    positions = None if alone else torch.arange(2).unsqueeze(0)
    ids, labels = np.array([NO_SEQUENCE]), np.array([0])
    return MicroBatch(
        tokens, positions, none, none.clone(), [2], [position], [2], [NO_SEQUENCE], ids, labels
    )
