"""The prepared sources of a stage as one endless, ordered stream of sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.core import units
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.data.collate import (
    CollatedBatch,
    NativeCollator,
    build_native_collator,
    collate_segments,
)
from dtrain.data.packing import Segments, join_segments
from dtrain.data.sampling import SamplingPlan
from dtrain.data.sources import SourceFile
from dtrain.data.store import Store
from dtrain.data.tokenize import notes

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class PackedSequence:
    """A sequence of one or more documents.

    Attributes:
        input_ids: int32 [n].
        is_target: bool [n], the loss mask.
        lengths: int32 [documents], sum n.
        documents: "file:line" or "file#row" of each document.
    """

    input_ids: Int32s
    is_target: NDArray[np.bool_]
    lengths: Int32s
    documents: list[str]


@dataclass(frozen=True)
class BatchCounts:
    """Counts over some sequences.

    Attributes:
        supervised_tokens: targets.
        examples: rows whose documents begin in them; of stream packing, segments.
    """

    sequences: int
    tokens: int
    supervised_tokens: int
    examples: int


# Columns of a store, in the order of `BatchCounts` behind its first field.
COUNTED_COLUMNS = ("sequence_tokens", "sequence_targets", "sequence_examples")


@dataclass(frozen=True)
class PreparedSource:
    """A source and its store."""

    name: str
    source_files: list[SourceFile]
    store: Store

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is that of a dataset on the hub."""
        has_dataset = any(file.dataset is not None for file in self.source_files)
        return has_dataset and not local_path(self.name).exists()


class PackedDataset:
    """All sources of a stage; the order of their sequences is arithmetic of (position, seed).

    A sequence's id is its number over all sources, one source after the other.
    """

    def __init__(
        self, sources: list[PreparedSource], sampling: SamplingPlan, sequence_length: int
    ) -> None:
        self.sources, self.sampling, self.sequence_length = sources, sampling, sequence_length
        self.first_sequences = np.cumsum([0, *(source.store.sequences for source in sources)])
        self.first_documents = np.cumsum([0, *(source.store.documents for source in sources)])

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of everything that shapes the stream, except the seed."""
        stores = [[s.store.manifest["fingerprint"], None] for s in self.sources]
        shape: dict[str, Any] = {"sources": stores, "sequence_length": self.sequence_length}
        if self.sampling.phases:
            shape["phases"] = [[phase.start, *phase.quotas] for phase in self.sampling.phases]
        return fingerprint(shape)

    @property
    def sequences_per_epoch(self) -> int:
        """All sequences; of weighted sources, positions of one pass over the heaviest source."""
        return self.sampling.sequences_per_epoch

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest document, or of the longest part of it in one sequence."""
        return max(int(source.store.manifest["longest_segment"]) for source in self.sources)

    def source_counts(self) -> list[dict[str, Any]]:
        """Name, documents and tokens of each source, and whether it is a dataset of the hub."""
        return [
            {
                "name": source.name,
                "documents": source.store.documents,
                "tokens": int(source.store.manifest["tokens"]),
                "on_hub": source.is_on_hub,
            }
            for source in self.sources
        ]

    def sequences_in_epochs(self, epochs: float) -> int:
        """Positions of this many epochs."""
        return self.sampling.sequences_in_epochs(epochs)

    def sequence_ids_at(self, start: int, stop: int, seed: int) -> Int64s:
        """Sequence ids [stop - start] at positions start … stop - 1 of the endless stream."""
        return self.sampling.sequence_ids_at(np.arange(start, stop, dtype=np.int64), seed)

    def sequence(self, sequence_id: int) -> PackedSequence:
        """Read a sequence."""
        source = int(self.sources_of(np.array([sequence_id]))[0])
        stored = self.sources[source].store.sequence(
            sequence_id - int(self.first_sequences[source])
        )
        files = self.sources[source].source_files
        documents = [
            files[file].location(row)
            for file, row in zip(stored.file_indices, stored.row_numbers, strict=True)
        ]
        return PackedSequence(stored.tokens, stored.is_target, stored.lengths, documents)

    def read(self, sequence_ids: Int64s) -> CollatedBatch:
        """Collate these sequences [n] for a micro-batch."""
        if self._native_collator:
            return self._native_collator(sequence_ids)
        return collate_segments(self.gather(sequence_ids))

    @cached_property
    def _native_collator(self) -> NativeCollator | None:
        stores = [source.store for source in self.sources]
        return build_native_collator(stores, self.sequence_length)

    def gather(self, sequence_ids: Int64s) -> Segments:
        """Return the segments of these sequences [n]."""
        sources = self.sources_of(sequence_ids)
        by_store, indices = [], []
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            local = sequence_ids[here] - self.first_sequences[source]
            segments = self.sources[source].store.gather(local)
            documents = segments.documents + self.first_documents[source]
            by_store.append(replace(segments, documents=documents))
            indices.append(here)
        return join_segments(by_store, indices)

    def tokens(self, sequence_ids: Int64s) -> Int64s:
        """Tokens of each of these sequences, [n]."""
        return self._look_up(sequence_ids, "sequence_tokens")

    def counts(self, sequence_ids: Int64s) -> BatchCounts:
        """Counts over these sequences [n]."""
        sums = [int(self._look_up(sequence_ids, column).sum()) for column in COUNTED_COLUMNS]
        return BatchCounts(len(sequence_ids), *sums)

    def counts_by_source(self, sequence_ids: Int64s) -> dict[str, BatchCounts]:
        """Counts over those of these sequences [n] that are of each source, by its name."""
        sources = self.sources_of(sequence_ids)
        sums = [np.bincount(sources, minlength=len(self.names))]
        for column in COUNTED_COLUMNS:
            values = self._look_up(sequence_ids, column)
            sums.append(np.bincount(sources, values, len(self.names)))
        totals = np.stack(sums, axis=1).astype(np.int64).tolist()
        return {name: BatchCounts(*row) for name, row in zip(self.names, totals, strict=True)}

    @cached_property
    def names(self) -> list[str]:
        """Name of each source; a source that is listed twice gets a number."""
        paths = [source.name for source in self.sources]
        return [
            f"{path} #{paths[:index].count(path) + 1}" if paths.count(path) > 1 else path
            for index, path in enumerate(paths)
        ]

    def sources_of(self, sequence_ids: Int64s) -> Int64s:
        """Index of the source of each of these sequences [n]."""
        return np.searchsorted(self.first_sequences, sequence_ids, side="right") - 1

    def verify(self) -> None:
        """Hash the stores again.

        Raises:
            UserError: naming the first file that is not what was written.
        """
        for source in self.sources:
            source.store.verify()

    def describe(self) -> str:
        """A line for each source: sequences, tokens, how full they are, what was left out."""
        lines = [self._describe(source) for source in self.sources]
        if len(self.sampling.sequences) == len(lines):  # else the plan has sources and replay
            for phase in self.sampling.phases:
                shares = ", ".join(f"{share:.2%}" for share in phase.shares)
                lines.append(f"from sequence {phase.start + 1:,} on: {shares} of the sequences")
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What was cut, left out or changed when the rows were read, each with its source."""
        return [
            f"{source.name}: {note}"
            for source in self.sources
            for note in notes(source.store.manifest["counts"])
        ]

    def _describe(self, source: PreparedSource) -> str:
        totals = source.store.manifest
        fill = totals["tokens"] / (totals["sequences"] * self.sequence_length)
        line = (
            f"{source.name}: {totals['documents']:,} documents in {totals['sequences']:,} "
            f"sequences of {self.sequence_length}, {units.count(totals['tokens'])} tokens "
            f"({units.count(totals['supervised_tokens'])} targets), {fill:.2%} full"
        )
        return "; ".join([line, *notes(totals["counts"])])

    def _look_up(self, sequence_ids: Int64s, column: str) -> Int64s:
        values = np.empty(len(sequence_ids), dtype=np.int64)
        sources = self.sources_of(sequence_ids)
        for index, source in enumerate(self.sources):
            here = sources == index
            local = sequence_ids[here] - self.first_sequences[index]
            values[here] = getattr(source.store, column)[local]
        return values


def check_vocabulary(dataset: PackedDataset, vocabulary_size: int) -> None:
    """Check that the model has an embedding for every token id of the data.

    Raises:
        UserError: naming the source and the token id.
    """
    for source in dataset.sources:
        largest = source.store.manifest["largest_token"]
        if largest >= vocabulary_size:
            raise UserError(
                f"token id {largest} is beyond the model's vocabulary of {vocabulary_size}",
                where=source.name,
                fix="use the tokenizer that belongs to the model, or a model with a vocabulary "
                f"of at least {largest + 1}",
            )
