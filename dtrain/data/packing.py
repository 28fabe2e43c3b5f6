"""Documents into rows of a fixed number of tokens.

A row is a list of pieces; a piece is a run of tokens of one document. All functions plan over all
documents at once, in numpy, and give the same plan for the same lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

SEGMENT = np.dtype([("document", "<i8"), ("start", "<i4"), ("tokens", "<i4")])


class Packing(Enum):
    """How documents share sequences."""

    STREAM = "one after the other, cut where a sequence is full; every token is a target"
    WHOLE = "never cut, and the documents of one row (an example) stay in one sequence"


@dataclass(frozen=True)
class PackingPlan:
    """Which pieces make which row.

    Attributes:
        pieces: PIECE [pieces], in the order of the rows.
        rows: [rows + 1], row r holds the pieces rows[r] … rows[r + 1] - 1.
    """

    pieces: NDArray[np.void]
    rows: Int64s


def best_fit_decreasing(lengths: Int64s, capacity: int) -> Int64s:
    """The row of each document: longest first, each into the fullest row that still holds it.

    Best-fit decreasing (Johnson, 1973). Documents of one length are placed together: the fullest
    row with enough space stays the fullest one until it is full, so a row with `space` left takes
    `space // length` of them in a go, and the work grows with the number of distinct lengths.

    Args:
        lengths: tokens of each document, 1 … capacity.
        capacity: tokens of a row.

    Returns:
        int64 [documents], row numbers without gaps.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    rows = np.empty(lengths.size, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    spaces = _Spaces(capacity)
    distinct, counts = np.unique(-lengths, return_counts=True)
    place = 0
    for length, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while count:
            chosen, each = spaces.take(length, count)
            placed = min(count, chosen.size * each)
            rows[order[place : place + placed]] = np.repeat(chosen, each)[:placed]
            spaces.put_back(chosen, each, placed, length)
            place, count = place + placed, count - placed
    return rows


class _Spaces:
    """Open rows by their free space; a big integer's bits say which spaces there are."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.opened, self.present = capacity, 0, 0
        self.rows: dict[int, Int64s] = {}
        self._space = 0  # of the rows taken last

    def take(self, length: int, count: int) -> tuple[Int64s, int]:
        """Rows for up to `count` documents, all with the same space, and how many each holds."""
        fitting = self.present >> length
        if not fitting:
            return self._open(length, count)
        self._space = length + (fitting & -fitting).bit_length() - 1
        each = self._space // length
        rows = self.rows[self._space]
        wanted = -(-count // each)
        self._keep(self._space, rows[wanted:])
        return rows[:wanted], each

    def _open(self, length: int, count: int) -> tuple[Int64s, int]:
        self._space = self.capacity
        each = self.capacity // length
        first, self.opened = self.opened, self.opened - (-count // each)
        return np.arange(first, self.opened, dtype=np.int64), each

    def put_back(self, chosen: Int64s, each: int, placed: int, length: int) -> None:
        """Note what is left in the rows just taken; the last one may hold fewer than `each`."""
        full = placed // each
        self._add(self._space - each * length, chosen[:full])
        self._add(self._space - (placed - full * each) * length, chosen[full:])

    def _add(self, space: int, rows: Int64s) -> None:
        if rows.size and space in self.rows:
            rows = np.concatenate([self.rows[space], rows])
        if rows.size and space:
            self._keep(space, rows)

    def _keep(self, space: int, rows: Int64s) -> None:
        if rows.size:
            self.rows[space] = rows
            self.present |= 1 << space
        else:
            self.rows.pop(space, None)
            self.present &= ~(1 << space)


def pack_whole(lengths: Int64s, capacity: int, example_sizes: Int64s | None = None) -> PackingPlan:
    """Whole examples into rows by best-fit decreasing; no document is cut.

    Args:
        lengths: tokens of each document, at least 1; an example's sum to at most `capacity`.
        capacity: tokens of a row.
        example_sizes: documents of each example, which follow one another and stay together; None
            for one each.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    sizes = np.ones(lengths.size, np.int64) if example_sizes is None else example_sizes
    first = _offsets(sizes)[:-1]
    row_of = best_fit_decreasing(_sums(lengths, sizes), capacity)
    order = np.argsort(row_of, kind="stable").astype(np.int64)
    documents = ranges(first[order], sizes[order])
    counts = _sums(sizes[order], np.bincount(row_of))
    pieces = _pieces(documents, np.zeros(documents.size, np.int64), lengths[documents])
    return PackingPlan(pieces, _offsets(counts))


def pack_stream(lengths: Int64s, capacity: int) -> PackingPlan:
    """Documents one after the other, cut at every `capacity` tokens; every token is kept once.

    Args:
        lengths: tokens of each document, any number from 1.
        capacity: tokens of a row; the last row may be shorter.
    """
    starts = _offsets(lengths)
    total = int(starts[-1])
    edges = np.unique(np.concatenate([starts, np.arange(0, total, capacity, dtype=np.int64)]))
    begin, tokens = edges[:-1], np.diff(edges)
    document = np.searchsorted(starts, begin, side="right") - 1
    pieces = _pieces(document, begin - starts[document], tokens)
    return PackingPlan(pieces, _offsets(np.bincount(begin // capacity)))


def pack_one_document(lengths: Int64s, capacity: int) -> PackingPlan:
    """A row for each document; one longer than `capacity` takes several rows, none is lost."""
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = -(-lengths // capacity)
    document = np.repeat(np.arange(lengths.size, dtype=np.int64), rows)
    part = np.arange(document.size, dtype=np.int64) - np.repeat(_offsets(rows)[:-1], rows)
    start = part * capacity
    pieces = _pieces(document, start, np.minimum(lengths[document] - start, capacity))
    return PackingPlan(pieces, np.arange(document.size + 1, dtype=np.int64))


def pack_one_example(lengths: Int64s, example_sizes: Int64s) -> PackingPlan:
    """A row for each example, whose documents follow one another."""
    documents = np.arange(len(lengths), dtype=np.int64)
    pieces = _pieces(documents, np.zeros_like(documents), lengths)
    return PackingPlan(pieces, _offsets(example_sizes))


def keep_sequences(plan: PackingPlan, keep: NDArray[np.bool_]) -> PackingPlan:
    """The plan without the rows that `keep` (bool [rows]) leaves out."""
    counts = np.diff(plan.rows)
    return PackingPlan(plan.pieces[np.repeat(keep, counts)], _offsets(counts[keep]))


def _pieces(document: Int64s, start: Int64s, tokens: Int64s) -> NDArray[np.void]:
    pieces = np.empty(document.size, dtype=SEGMENT)
    pieces["document"], pieces["start"], pieces["tokens"] = document, start, tokens
    return pieces


def _sums(values: Int64s, counts: Int64s) -> Int64s:
    """Sums of counts[0] values, of the counts[1] after them, …"""
    return np.diff(_offsets(values)[_offsets(counts)])


def _offsets(counts: NDArray[np.integer]) -> Int64s:
    """[c0, c1, …] → [0, c0, c0 + c1, …]"""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """The pieces of some rows, in the order of the rows.

    Attributes:
        views: tokens of each piece, int32, as views of the mapped files.
        sizes: [P], of these.
        rows: [P], which of the rows (0, 1, …) a piece belongs to; never falls.
        documents, labels: [P], number and label of the document of each piece.
        run_pieces: [R], piece of each run of supervised tokens; never falls.
        run_starts, run_stops: [R], places in that piece; a run never starts at 0.
    """

    views: list[Int32s]
    sizes: Int64s
    rows: Int64s
    documents: Int64s
    labels: Int64s
    run_pieces: Int64s
    run_starts: Int64s
    run_stops: Int64s


def join_segments(parts: list[Segments], places: list[Int64s]) -> Segments:
    """Pieces of several stores as those of one.

    Args:
        parts: of each store.
        places: for each store, which rows of the whole its rows are, rising.
    """
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([place[part.rows] for part, place in zip(parts, places, strict=True)])
    order = np.argsort(rows, kind="stable")
    moved = np.empty_like(order)
    moved[order] = np.arange(order.size)
    first = np.cumsum([0, *(len(part.views) for part in parts)])
    own = [part.run_pieces + shift for part, shift in zip(parts, first[:-1], strict=True)]
    pieces = moved[np.concatenate(own)]
    by_piece = np.argsort(pieces, kind="stable")
    views = [view for part in parts for view in part.views]
    return Segments(
        [views[place] for place in order.tolist()],
        np.concatenate([part.sizes for part in parts])[order],
        rows[order],
        np.concatenate([part.documents for part in parts])[order],
        np.concatenate([part.labels for part in parts])[order],
        pieces[by_piece],
        np.concatenate([part.run_starts for part in parts])[by_piece],
        np.concatenate([part.run_stops for part in parts])[by_piece],
    )


def ranges(first: Int64s, counts: Int64s) -> Int64s:
    """first[0], first[0] + 1, … (counts[0] of them), first[1], …"""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total) + np.repeat(first - ends + counts, counts)
