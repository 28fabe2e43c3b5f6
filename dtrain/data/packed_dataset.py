"""The prepared sources of a stage as one endless, ordered stream of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.core import units
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
    """One sequence, of one or more documents.

    Attributes:
        input_ids: int32 [n].
        supervised: bool [n], whether the token is a target.
        lengths: int32 [documents], sum n.
        documents: "file:line" or "file#row" of each document.
    """

    input_ids: Int32s
    supervised: NDArray[np.bool_]
    lengths: Int32s
    documents: list[str]


COUNTED_COLUMNS = (
    "sequence_tokens",
    "sequence_targets",
    "sequence_examples",
)  # in BatchCounts' order


@dataclass(frozen=True)
class BatchCounts:
    """What some sequences hold.

    Attributes:
        supervised_tokens: targets.
        examples: rows whose documents begin in them; of stream packing, segments.
    """

    sequences: int
    tokens: int
    supervised_tokens: int
    examples: int


@dataclass(frozen=True)
class PreparedSource:
    """A source and its store."""

    name: str
    parts: list[SourceFile]
    store: Store


class PackedDataset:
    """All sources of a stage; what stands where is arithmetic of (position, seed)."""

    def __init__(
        self, sources: list[PreparedSource], mix: SamplingPlan, sequence_length: int
    ) -> None:
        self.sources, self.mix, self.sequence_length = sources, mix, sequence_length
        self.first_sequences = np.cumsum([0, *(source.store.rows for source in sources)])
        self.first_documents = np.cumsum([0, *(source.store.documents for source in sources)])

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that shapes the stream, but the seed."""
        stores = [[s.store.manifest["fingerprint"], None] for s in self.sources]
        shape: dict[str, Any] = {"sources": stores, "sequence_length": self.sequence_length}
        if self.mix.phases:
            shape["phases"] = [[phase.start, *phase.quotas] for phase in self.mix.phases]
        return fingerprint(shape)

    @property
    def sequences_per_epoch(self) -> int:
        """All rows; of a weighted mixture, positions for one pass over the heaviest source."""
        return self.mix.sequences_per_epoch

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest document, as far as one row holds it."""
        return max(int(source.store.manifest["longest_segment"]) for source in self.sources)

    def sequences_in_epochs(self, passes: float) -> int:
        """Positions of so many passes."""
        return self.mix.sequences_in_epochs(passes)

    def sequence_ids_at(self, start: int, stop: int, seed: int) -> Int64s:
        """Global row numbers [stop - start] at positions start … stop-1 of the endless stream."""
        return self.mix.sequence_ids_at(np.arange(start, stop, dtype=np.int64), seed)

    def row(self, number: int) -> PackedSequence:
        """Read the row with this global number."""
        source, local = self._locate(number)
        data = self.sources[source].store.row(local)
        parts = self.sources[source].parts
        places = [parts[p].location(n) for p, n in zip(data.parts, data.numbers, strict=True)]
        return PackedSequence(data.tokens, data.supervised, data.lengths, places)

    def read(self, numbers: Int64s) -> CollatedBatch:
        """The rows [n] with these global numbers, as a micro-batch has them."""
        return self._gatherer(numbers) if self._gatherer else collate_segments(self.gather(numbers))

    @cached_property
    def _gatherer(self) -> NativeCollator | None:
        return build_native_collator(
            [source.store for source in self.sources], self.sequence_length
        )

    def gather(self, numbers: Int64s) -> Segments:
        """What the rows [n] with these global numbers are made of."""
        which = self.sources_of(numbers)
        places = [np.flatnonzero(which == source) for source in range(len(self.sources))]
        used = [(source, place) for source, place in enumerate(places) if place.size]
        parts = []
        for source, place in used:
            part = self.sources[source].store.gather(numbers[place] - self.first_sequences[source])
            parts.append(replace(part, documents=part.documents + self.first_documents[source]))
        return join_segments(parts, [place for _, place in used])

    def tokens(self, numbers: Int64s) -> Int64s:
        """Tokens in each of these rows, [n]."""
        return self._look_up(numbers, "sequence_tokens")

    @cached_property
    def names(self) -> list[str]:
        """What each source is called; one that is there twice gets a number."""
        paths = [source.name for source in self.sources]
        return [
            f"{path} #{paths[:place].count(path) + 1}" if paths.count(path) > 1 else path
            for place, path in enumerate(paths)
        ]

    def sources_of(self, numbers: Int64s) -> Int64s:
        """Number of the source of each of these rows [n]."""
        return np.searchsorted(self.first_sequences, numbers, side="right") - 1

    def counts(self, numbers: Int64s) -> BatchCounts:
        """What these rows [n] hold."""
        sums = [int(self._look_up(numbers, column).sum()) for column in COUNTED_COLUMNS]
        return BatchCounts(len(numbers), *sums)

    def counts_by_source(self, numbers: Int64s) -> dict[str, BatchCounts]:
        """What these rows [n] hold of each source, by its name."""
        which = self.sources_of(numbers)
        sums = [np.bincount(which, minlength=len(self.names))]
        for column in COUNTED_COLUMNS:
            sums.append(np.bincount(which, self._look_up(numbers, column), len(self.names)))
        totals = np.stack(sums, axis=1).astype(np.int64).tolist()
        return {name: BatchCounts(*row) for name, row in zip(self.names, totals, strict=True)}

    def verify(self) -> None:
        """Hash the stores again.

        Raises:
            UserError: naming the first file that is not what was written.
        """
        for source in self.sources:
            source.store.verify()

    def describe(self) -> str:
        """A line for each source: rows, tokens, how full the rows are, what was cut or left out."""
        lines = [self._describe(source) for source in self.sources]
        if len(self.mix.rows) == len(lines):  # else the sources are one beside what is replayed
            for phase in self.mix.phases:
                shares = ", ".join(f"{share:.2%}" for share in phase.shares)
                lines.append(f"from sequence {phase.start + 1:,} on: {shares} of the sequences")
        return "\n".join(lines)

    def notes(self) -> list[str]:
        """What was cut, left out or read in another way, each with its source."""
        return [
            f"{source.name}: {note}"
            for source in self.sources
            for note in notes(source.store.manifest["counts"])
        ]

    def _describe(self, source: PreparedSource) -> str:
        facts = source.store.manifest
        fill = facts["tokens"] / (facts["rows"] * self.sequence_length)
        line = (
            f"{source.name}: {facts['documents']:,} documents in {facts['rows']:,} rows of "
            f"{self.sequence_length}, {units.count(facts['tokens'])} tokens "
            f"({units.count(facts['supervised_tokens'])} learnt), rows {fill:.2%} full"
        )
        return "; ".join([line, *notes(facts["counts"])])

    def _locate(self, number: int) -> tuple[int, int]:
        first_sequences = self.first_sequences
        source = int(np.searchsorted(first_sequences, number, side="right")) - 1
        return source, number - int(first_sequences[source])

    def _look_up(self, numbers: Int64s, column: str) -> Int64s:
        out = np.empty(len(numbers), dtype=np.int64)
        which = self.sources_of(numbers)
        for index, source in enumerate(self.sources):
            here = which == index
            out[here] = getattr(source.store, column)[numbers[here] - self.first_sequences[index]]
        return out


def check_vocabulary(dataset: PackedDataset, vocabulary_size: int) -> None:
    """Refuse data with a token id that the model has no embedding for.

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
