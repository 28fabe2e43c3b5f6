"""What a scan keeps: a compact record per row, never the rows themselves."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dtrain.data.duplicates import PERMUTATIONS, Int64s
from dtrain.data.records import Record, SourceRows
from dtrain.data_quality.finding_types import FLAG_BITS

MAX_NOTES = 20  # kept of each kind, the most severe ones
MAX_COUNTED = 50_000  # distinct values that a CappedCounter holds
GROWTH_ROWS = 1 << 15  # rows, or a 32nd, by which the table grows

# Keys of the row's text, its question, its answer and the question's opening, after normalization;
# short keys of what decides whether two similar rows say the same; tokens (0 if not counted); bits
# of FLAG_BITS; the lowest byte of each value of the MinHash signature; whether there is a question.
# 175 bytes, without padding.
ROW = np.dtype(
    [
        *((name, "<u8") for name in ("text", "question", "answer", "opening")),
        *((name, "<u2") for name in ("question_words", "question_numbers", "answer_words")),
        *((name, "<i4") for name in ("question_characters", "answer_characters", "tokens")),
        ("flags", "<u4"),
        ("sketch", "u1", (PERMUTATIONS,)),
        ("asked", "?"),
    ]
)


class RowNote(NamedTuple):
    """One example of a finding: its severity, the index of its row, and what was found."""

    severity: float
    row: int
    text: str


@dataclass
class CheckedBatch:
    """The results of a batch of rows.

    Attributes:
        rows: ROW [rows].
        notes: by kind; their rows are indices into the batch.
        languages, actions, openings, preferences: counts.
    """

    rows: NDArray[np.void]
    notes: dict[str, list[RowNote]]
    languages: Counter[str]
    actions: Counter[tuple[str, str] | str]
    openings: Counter[tuple[str, str] | str]
    preferences: Counter[str]


class RowTable:
    """An array of ROW that grows without holding two copies."""

    def __init__(self) -> None:
        self._rows = np.empty(0, ROW)
        self._size = 0

    def add(self, rows: NDArray[np.void]) -> None:
        """Append rows; views that `rows` returned before are invalid afterwards."""
        stop = self._size + len(rows)
        if stop > len(self._rows):
            # realloc moves the pages of a large block and does not copy its bytes.
            self._rows.resize(stop + max(GROWTH_ROWS, stop // 32), refcheck=False)
        self._rows[self._size : stop] = rows
        self._size = stop

    @property
    def rows(self) -> NDArray[np.void]:
        """A view of all rows, ROW [rows]."""
        return self._rows[: self._size]


class RowLocations:
    """Source, file and line of each row; consecutive lines take no memory."""

    def __init__(self) -> None:
        self._runs: list[Int64s] = []
        self._rows = 0

    def add(self, locations: Int64s) -> None:
        """Append (source, file, line) of each row, [rows, 3]."""
        steps = np.diff(locations, axis=0, prepend=locations[:1])
        steps[1:, 2] -= 1
        heads = np.flatnonzero(steps.any(axis=1))
        heads = np.concatenate([[0], heads]) if len(locations) else heads
        self._runs.append(np.column_stack([self._rows + heads, locations[heads]]))
        self._rows += len(locations)

    def __getitem__(self, row: int) -> tuple[int, int, int]:
        run = self._all_runs[:, 0].searchsorted(row, "right") - 1
        first_row, source, file, line = self._all_runs[run]
        return int(source), int(file), int(line + row - first_row)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(runs.nbytes for runs in self._runs)

    @cached_property
    def _all_runs(self) -> Int64s:
        return np.concatenate(self._runs)


class CappedCounter:
    """Counts of the most frequent values, in bounded memory."""

    def __init__(self) -> None:
        self.counter: Counter[tuple[str, str] | str] = Counter()

    def update(self, counts: Counter[tuple[str, str] | str]) -> None:
        """Add counts; above MAX_COUNTED values, the rarest are dropped."""
        self.counter.update(counts)
        if len(self.counter) > MAX_COUNTED:
            self.counter = Counter(dict(self.counter.most_common(MAX_COUNTED // 2)))


@dataclass
class ScanResult:
    """The result of a scan; a row is identified by its index among all readable rows.

    Attributes:
        has_tokens: whether the tokens of the rows were counted.
        rows_per_source: number of rows, by index of the source.
        preferences: sums over preference rows (see `preference_checks.describe`).
        unreadable: number of rows that cannot be read.
        note_counts: what the chat template did to the rows, and columns that the format does not
            read (see `tokenize.notes`).
    """

    sources: list[SourceRows]
    sequence_length: int | None
    has_tokens: bool
    table: RowTable = field(default_factory=RowTable)
    locations: RowLocations = field(default_factory=RowLocations)
    rows_per_source: Counter[int] = field(default_factory=Counter)
    notes: dict[str, list[RowNote]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    actions: CappedCounter = field(default_factory=CappedCounter)
    openings: CappedCounter = field(default_factory=CappedCounter)
    preferences: Counter[str] = field(default_factory=Counter)
    note_counts: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    unreadable_notes: list[str] = field(default_factory=list)

    def add(self, records: list[tuple[int, Record]], batch: CheckedBatch) -> None:
        """Add a batch; its records come with the index of their source."""
        for kind, notes in batch.notes.items():
            shifted = [RowNote(n.severity, self.rows + n.row, n.text) for n in notes]
            self.add_notes(kind, shifted)
        self.languages.update(batch.languages)
        self.actions.update(batch.actions)
        self.openings.update(batch.openings)
        self.preferences.update(batch.preferences)
        self.rows_per_source.update(source for source, _ in records)
        self.table.add(batch.rows)
        locations = [(source, record.file_index, record.row_number) for source, record in records]
        self.locations.add(np.array(locations, np.int64).reshape(-1, 3))

    def add_notes(self, kind: str, notes: Iterable[RowNote]) -> None:
        """Keep the most severe notes of a kind."""
        candidates = [*self.notes.get(kind, []), *notes]
        self.notes[kind] = heapq.nlargest(
            MAX_NOTES, candidates, key=lambda note: (note.severity, -note.row)
        )

    def location(self, row: int) -> str:
        """The file and line of a row."""
        source, file, line = self.locations[row]
        return self.sources[source].files[file].location(line)

    @property
    def rows(self) -> int:
        """The number of readable rows."""
        return len(self.table.rows)

    def column(self, name: str) -> NDArray[Any]:
        """A view of one field of ROW, [rows]."""
        return self.table.rows[name]

    @property
    def flags(self) -> NDArray[np.uint32]:
        """The findings of each row as bits of FLAG_BITS, [rows]."""
        return self.column("flags")

    def has_finding(self, *kinds: str) -> NDArray[np.bool_]:
        """Whether a row has a finding of one of these kinds, [rows]."""
        bits = np.uint32(sum(FLAG_BITS[kind] for kind in kinds))
        return (self.flags & bits).astype(bool)

    def state_bytes(self) -> int:
        """Bytes of memory that grow with the number of rows."""
        return self.table.rows.nbytes + self.locations.nbytes
