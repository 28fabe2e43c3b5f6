"""The micro-batches of any rank at any step, for any number of ranks.

The loader's state is the step number: the content of a step follows from dataset and seed alone.
So the batch of a resumed step is computed in `Loader.batch`, as every other one.

Letters: T tokens of a micro-batch, K targets, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.data.packed_dataset import BatchCounts, PackedDataset
from dtrain.distributed.tensor_utils import send

Int64s = NDArray[np.int64]

NO_SEQUENCE = -1
ORDER_AHEAD = 1 << 14  # sequences whose ids are computed at once


def _empty() -> Int64s:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that a rank computes at once, laid end to end, never padded.

    Attributes:
        input_ids: int64 [1, T].
        position_ids: int64 [1, T], from 0 in each document; None for a single document.
        target_positions: int64 [K], positions whose next token is a target of the same document.
        targets: int64 [K], those next tokens.
        document_lengths: tokens of each document, sum T.
        sequences: position of each sequence in the endless stream.
        sequence_lengths: tokens of each sequence, sum T.
        sequence_ids: id of each sequence in the dataset, whatever the order of training.
        document_ids: id of each document in the dataset, [D]. The documents of one row follow one
            another.
        labels: of each document, as its row encoder set it, [D].
        target_weights: float32 [K], factor of each target's loss; None if all are 1.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    target_positions: torch.Tensor
    targets: torch.Tensor
    document_lengths: list[int]
    sequences: list[int]
    sequence_lengths: list[int]
    sequence_ids: list[int] = field(default_factory=list)
    document_ids: Int64s = field(default_factory=_empty)
    labels: Int64s = field(default_factory=_empty)
    target_weights: torch.Tensor | None = None

    @property
    def document_starts(self) -> Int64s:
        """Position of the first token of each document, [D]."""
        return np.cumsum([0, *self.document_lengths])[:-1]

    def sequences_at(self, positions: Int64s) -> NDArray[np.intp]:
        """Index in the micro-batch of the sequence of each of these token positions [n]."""
        return np.cumsum(self.sequence_lengths).searchsorted(positions, side="right")

    def to(self, device: torch.device) -> MicroBatch:
        """Return the micro-batch with its tensors on `device`."""
        if device.type == "cpu":
            return self
        tensors: dict[str, Any] = {
            name: send(value, device)
            for name, value in vars(self).items()
            if torch.is_tensor(value)
        }
        return replace(self, **tensors)


class Loader:
    """The batches of a stage or of a held-out set."""

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        seed: int,
        global_batch: int,
        total_sequences: int,
        alone: bool = False,
        loss_weights: Sequence[float] = (),
    ) -> None:
        """Divide the first `total_sequences` sequences of the stream into steps.

        Args:
            dataset: prepared data.
            seed: of the recipe.
            global_batch: sequences of a step, over all ranks.
            total_sequences: sequences of the whole stage; the last step may be short.
            alone: the model computes one document at a time: every sequence has one document, and
                every micro-batch one sequence.
            loss_weights: factor of the loss of each source's tokens; none for 1.
        """
        self.dataset, self.seed = dataset, seed
        self.global_batch, self.total_sequences = global_batch, total_sequences
        self.alone = alone
        self.loss_weights = np.array(loss_weights, dtype=np.float32)
        self._window = StepWindow(max(1, ORDER_AHEAD // global_batch))
        self._ids = np.empty((0, global_batch), dtype=np.int64)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return -(-self.total_sequences // self.global_batch)

    def batch(self, step: int) -> Int64s:
        """Sequence ids [global_batch] of a step; NO_SEQUENCE fills a short last one."""
        if steps := self._window.advance(step):
            self._ids = self._batches(step, min(steps, max(1, self.steps - step)))
            self._window.stop = step + len(self._ids)
        return self._ids[step - self._window.first]

    def _batches(self, step: int, steps: int) -> Int64s:
        """Sequence ids [steps, global_batch] of several steps."""
        start = step * self.global_batch
        stop = min(start + steps * self.global_batch, self.total_sequences)
        ids = np.full(steps * self.global_batch, NO_SEQUENCE, dtype=np.int64)
        ids[: max(0, stop - start)] = self.dataset.sequence_ids_at(start, stop, self.seed)
        return ids.reshape(steps, self.global_batch)

    def counts(self, step: int) -> BatchCounts:
        """Counts over the global batch of all ranks."""
        return self.dataset.counts(self._existing(step))

    def counts_by_source(self, step: int) -> dict[str, BatchCounts]:
        """Counts over what each source contributes to the global batch."""
        return self.dataset.counts_by_source(self._existing(step))

    @property
    def source_names(self) -> list[str]:
        """Names of the sources."""
        return self.dataset.names

    def sources_at(self, step: int, batch: MicroBatch, positions: Int64s) -> Int64s:
        """Index of the source of each of these token positions [n] in a micro-batch of a step."""
        indices = np.array(batch.sequences, dtype=np.int64) - step * self.global_batch
        sources = self.dataset.sources_of(self.batch(step)[indices])
        return sources[batch.sequences_at(positions)]

    def micro_batches(
        self, step: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator[MicroBatch]:
        """Yield the micro-batches of `rank` in a step; every rank gets the same number of them.

        Args:
            step: from 0.
            rank: 0 … ranks - 1.
            ranks: number of ranks; each takes a contiguous slice of the global batch.
            micro_batch: sequences at once.
        """
        assert micro_batch == 1 or not self.alone
        share = -(-self.global_batch // ranks)
        ids = self.batch(step)[rank * share : (rank + 1) * share]
        ids = ids if step + 1 < self.steps else ids[ids != NO_SEQUENCE]
        position = step * self.global_batch + rank * share
        for start in range(0, share, micro_batch):
            yield self.read(ids[start : start + micro_batch], position + start)

    def read(self, ids: Int64s, position: int = 0) -> MicroBatch:
        """These sequences [n], the first of which is at `position` of the stream.

        Without sequences it is a micro-batch of two tokens and no target.
        """
        if not ids.size:
            return _empty_micro_batch(position, alone=self.alone)
        collated = self.dataset.read(ids)
        assert len(collated.lengths) == 1 or not self.alone
        batch = MicroBatch(
            torch.from_numpy(collated.ids),
            None if self.alone else torch.from_numpy(collated.positions),
            torch.from_numpy(collated.target_positions),
            torch.from_numpy(collated.targets),
            collated.lengths,
            list(range(position, position + len(ids))),
            collated.sequence_tokens,
            ids.tolist(),
            collated.documents,
            collated.labels,
        )
        if not self.loss_weights.size:
            return batch
        sources = self.dataset.sources_of(ids)[batch.sequences_at(collated.target_positions)]
        return replace(batch, target_weights=torch.from_numpy(self.loss_weights[sources]))

    def _existing(self, step: int) -> Int64s:
        ids = self.batch(step)
        return ids[ids != NO_SEQUENCE]


class StepWindow:
    """The steps whose order is computed: one after a jump, then four times as many each time."""

    def __init__(self, max_steps: int) -> None:
        self.first, self.stop, self.max_steps = 0, 0, max_steps

    def advance(self, step: int) -> int:
        """Return 0 if `step` is computed already; otherwise how many steps to compute from it."""
        if self.first <= step < self.stop:
            return 0
        is_next = step == self.stop and self.stop > self.first
        size = min(4 * (self.stop - self.first), self.max_steps) if is_next else 1
        self.first, self.stop = step, step + size
        return size


def _empty_micro_batch(position: int, *, alone: bool) -> MicroBatch:
    """Two tokens and no target: a rank without sequences still takes part in every collective.

    With one token, GPUs would compile their kernels again, on this rank alone.
    """
    none = torch.zeros(0, dtype=torch.int64)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    positions = None if alone else torch.arange(2).unsqueeze(0)
    ids, labels = np.array([NO_SEQUENCE]), np.array([0])
    return MicroBatch(
        tokens, positions, none, none.clone(), [2], [position], [2], [NO_SEQUENCE], ids, labels
    )
