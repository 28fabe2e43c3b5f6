"""All rows of a stage, or of some files, through all checks; memory holds sketches, never rows."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dtrain.config.schema import Source
from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import EmptyData, UserError
from dtrain.core.log import Meter, progress
from dtrain.data.formats import RowContent
from dtrain.data.records import BadRecord, Record, detect, iter_records
from dtrain.data.sources import SourceFile, find_source_files
from dtrain.data.special_tokens import SpecialTokens
from dtrain.data_quality import duplicates
from dtrain.data_quality.decontamination import HeldOut
from dtrain.data_quality.diversity import Counts
from dtrain.data_quality.finding_types import (
    BIT,
    BROKEN,
    EXACT,
    INCONSISTENT,
    LEAK,
    NEAR,
    OVERLONG,
    SPECIAL,
    TEMPLATE,
)
from dtrain.data_quality.row_checks import NOTES, Examined, Note, examine, examine_here, remember
from dtrain.data_quality.sample import sample_of
from dtrain.data_quality.table import Places, Table
from dtrain.data_quality.text_checks import EMPTY

BATCH_ROWS = 1000
BATCH_CHARACTERS = 1 << 22
SIMILARITY = 0.8  # from here on two rows are nearly the same
REFUSED = -1  # number of tokens of a row that the template refuses


class Tokens(Protocol):
    """Counts the tokens of rows as a stage would make them (`lengths.TokenCounter`)."""

    reasons: dict[int, str]
    counts: Counter[str]
    special_tokens: SpecialTokens

    def __call__(self, values: list[RowContent], /) -> NDArray[np.int32]:
        """Tokens of each row, REFUSED where the template refuses it."""


@dataclass(frozen=True)
class Input:
    """A source to be scanned: its files, and how they are read."""

    name: str
    parts: list[SourceFile]
    form: str
    columns: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[Record | BadRecord]:
        """All rows, those that cannot be used as faults."""
        return iter_records(self.parts, self.form, self.columns)

    def check_unchanged(self) -> None:
        """Check that what was read is what the source's files were at first.

        Raises:
            UserError: a file changed.
        """
        for part in self.parts:
            part.check_unchanged(again=True)


def source_input(source: Source) -> Input:
    """A source, its files found and its format with them.

    Raises:
        UserError: there is nothing to read.
    """
    parts = find_source_files(source, cache_folder() / "stores")
    columns: dict[Any, str] = dict(source.columns)
    try:
        form = detect(parts, columns) if source.format == "auto" else source.format
    except EmptyData:
        form = "text"  # a report of no rows is one too
    return Input(source.path, parts, form, columns)


@dataclass
class Findings:
    """What a scan found; a row is known by its number among all rows that could be read.

    Attributes:
        counted: whether the tokens of the rows are known.
        of_source: rows of each source.
        broken: rows that cannot be read.
        rendered: what the chat template did to them, as `tokenise.notes` puts it into words.
    """

    inputs: list[Input]
    sequence_length: int | None
    counted: bool
    table: Table = field(default_factory=Table)
    places: Places = field(default_factory=Places)
    of_source: Counter[int] = field(default_factory=Counter)
    notes: dict[str, list[Note]] = field(default_factory=dict)
    languages: Counter[str] = field(default_factory=Counter)
    orders: Counts = field(default_factory=Counts)
    openings: Counts = field(default_factory=Counts)
    broken: int = 0
    rendered: Counter[str] = field(default_factory=Counter)
    broken_notes: list[str] = field(default_factory=list)

    def add(self, records: list[tuple[int, Record]], examined: Examined) -> None:
        """Take in a batch: records with the number of their source."""
        for kind, notes in examined.notes.items():
            placed = [(weight, self.rows + row, note) for weight, row, note in notes]
            self.note(kind, placed)
        self.languages.update(examined.languages)
        self.orders.update(examined.orders)
        self.openings.update(examined.openings)
        self.of_source.update(source for source, _ in records)
        self.table.add(examined.rows)
        places = [(source, record.file_index, record.row_number) for source, record in records]
        self.places.add(np.array(places, np.int64).reshape(-1, 3))

    def note(self, kind: str, notes: Iterable[Note]) -> None:
        """Keep the worst notes of a kind."""
        both = [*self.notes.get(kind, []), *notes]
        self.notes[kind] = heapq.nlargest(NOTES, both, key=lambda note: (note[0], -note[1]))

    def place(self, row: int) -> str:
        """file:line of a row."""
        source, part, number = self.places.of(row)
        return self.inputs[source].parts[part].location(number)

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.table.rows)

    def column(self, name: str) -> NDArray[Any]:
        """One of `table.ROW`, of all rows, as it lies in the table."""
        return self.table.rows[name]

    @property
    def flags(self) -> NDArray[np.uint32]:
        """What was found in each row, bits of `kinds.BIT`."""
        return self.column("flags")

    def having(self, *kinds: str) -> NDArray[np.bool_]:
        """Whether one of these was found in a row, [rows]."""
        bits = np.uint32(sum(BIT[kind] for kind in kinds))
        return (self.flags & bits).astype(bool)

    def state_bytes(self) -> int:
        """Memory that grows with the rows."""
        return self.table.rows.nbytes + self.places.nbytes


def scan(
    inputs: list[Input],
    *,
    known: HeldOut | None = None,
    tokens: Tokens | None = None,
    sequence_length: int | None = None,
    processes: int = 1,
) -> Findings:
    """Examine all rows.

    Args:
        inputs: what to read.
        known: held-out data that must not be in it.
        tokens: counts the tokens of rows as a stage would make them; REFUSED for a refused row.
        sequence_length: tokens that a sequence holds.
        processes: that check rows beside this one, which reads; with 1 this one does both.
    """
    found = Findings(inputs, sequence_length, counted=tokens is not None)
    total = sum(part.path.stat().st_size for i in inputs for part in i.parts if part.path)
    with progress("scanning", total >> 20) as meter, ExitStack() as stack:
        work = _worker(processes, known, stack)
        for records, future in _ahead(_batches(inputs, found, meter), work, 2 * processes):
            counts = tokens([record.value for _, record in records]) if tokens else 0
            examined = future()
            examined.rows["tokens"] = counts
            if tokens:
                reasons = tokens.reasons.items()
                found.note(TEMPLATE, [(0.0, found.rows + row, why) for row, why in reasons])
                found.rendered = tokens.counts
                _note_special_tokens(examined, records, tokens.special_tokens)
            found.add(records, examined)
    for one in inputs:
        one.check_unchanged()
    _across(found)
    return found


def _note_special_tokens(
    examined: Examined, records: list[tuple[int, Record]], special_tokens: SpecialTokens
) -> None:
    for row, (_, record) in enumerate(records):
        if names := special_tokens.found(record.value):
            examined.rows["flags"][row] |= BIT[SPECIAL]
            note = (float(len(names)), row, " ".join(names))
            examined.notes.setdefault(SPECIAL, []).append(note)


def _worker(
    processes: int, known: HeldOut | None, stack: ExitStack
) -> Callable[[list[tuple[int, Record]]], Callable[[], Examined]]:
    """What starts the work on a batch and returns how to get its result."""
    if processes == 1:
        return lambda records: lambda: examine([record.value for _, record in records], known)
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=remember, initargs=(known,)
    )
    stack.enter_context(pool)

    def start(records: list[tuple[int, Record]]) -> Callable[[], Examined]:
        future: Future[Examined] = pool.submit(
            examine_here, [record.value for _, record in records]
        )
        return future.result

    return start


def _ahead(
    batches: Iterator[list[tuple[int, Record]]],
    start: Callable[[list[tuple[int, Record]]], Callable[[], Examined]],
    most: int,
) -> Iterator[tuple[list[tuple[int, Record]], Callable[[], Examined]]]:
    """Batches in order, each with its result to come; `most` of them under way."""
    under_way: deque[tuple[list[tuple[int, Record]], Callable[[], Examined]]] = deque()
    for records in batches:
        under_way.append((records, start(records)))
        if len(under_way) >= most:
            yield under_way.popleft()
    yield from under_way


def _batches(
    inputs: list[Input], found: Findings, meter: Meter
) -> Iterator[list[tuple[int, Record]]]:
    batch: list[tuple[int, Record]] = []
    characters = seen = 0
    for source, one in enumerate(inputs):
        for item in one.rows():
            if isinstance(item, BadRecord):
                found.broken += 1
                if len(found.broken_notes) < NOTES:
                    found.broken_notes.append(_told(item.error))
                continue
            batch.append((source, item))
            size = _size(item.value)
            characters, seen = characters + size, seen + size
            if len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS:
                meter.advance((seen >> 20) - meter.done, f"{found.rows:,} rows")
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _told(error: UserError) -> str:
    return f"{error.where}: {error.what}"


def _size(value: RowContent) -> int:
    sample = sample_of(value)
    return len(sample.question) + len(sample.answer)


def _across(found: Findings) -> None:
    """What only all rows together show: duplicates, several answers, lengths."""
    column = found.column
    empty = found.having(EMPTY)
    for later, first in duplicates.exact(column("whole")):
        full = ~empty[later]
        _mark(found, EXACT, later[full], first[full])
    hidden = found.having(EMPTY, EXACT)
    for later, earlier, alike in duplicates.near(column("sketch"), SIMILARITY, hidden):
        _mark(found, NEAR, later, earlier, alike)
    asked = column("asked") & ~found.having(EMPTY, EXACT, NEAR)
    for later, first in duplicates.inconsistent(column("question"), column("answer"), asked):
        _mark(found, INCONSISTENT, later, first)
    if found.counted:
        _lengths(found)


def _mark(
    found: Findings,
    kind: str,
    rows: NDArray[np.int64],
    earlier: NDArray[np.int64],
    alike: NDArray[np.float32] | None = None,
) -> None:
    """Note that these rows are as earlier ones."""
    found.flags[rows] |= np.uint32(BIT[kind])
    how = np.zeros(len(rows), np.float32) if alike is None else alike
    for place in np.lexsort((rows, -how))[:NOTES].tolist():
        told = f"as {found.place(int(earlier[place]))}"
        told += "" if alike is None else f", {how[place]:.0%} alike"
        found.note(kind, [(float(how[place]), int(rows[place]), told)])


def _lengths(found: Findings) -> None:
    tokens = found.column("tokens")
    found.flags[tokens == REFUSED] |= np.uint32(BIT[TEMPLATE])
    if found.sequence_length:
        over = np.flatnonzero(tokens > found.sequence_length)
        found.flags[over] |= np.uint32(BIT[OVERLONG])
        worst = over[np.argsort(-tokens[over], kind="stable")][:NOTES].tolist()
        found.note(OVERLONG, [(float(tokens[r]), r, f"{tokens[r]:,} tokens") for r in worst])


__all__ = ["BROKEN", "LEAK", "Findings", "Input", "scan"]
