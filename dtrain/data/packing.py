"""Pack documents into sequences of a fixed number of tokens.

A sequence is a list of segments; a segment is a run of tokens of one document. All functions plan
over all documents at once, in numpy, and return the same plan for the same lengths.

Letters: S segments, R runs of target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]

SEGMENT = np.dtype([("document", "<i8"), ("start", "<i4"), ("tokens", "<i4")])


class Packing(Enum):
    """How documents share sequences."""

    STREAM = "one after the other, cut where a sequence is full; every token is a target"
    WHOLE = "never cut, and the documents of one row (an example) stay in one sequence"


@dataclass(frozen=True)
class PackingPlan:
    """Which segments make which sequence.

    Attributes:
        segments: SEGMENT [S], in the order of the sequences.
        sequences: [sequences + 1], sequence i has the segments sequences[i] … sequences[i + 1] - 1.
    """

    segments: NDArray[np.void]
    sequences: Int64s


def best_fit_decreasing(lengths: Int64s, capacity: int) -> Int64s:
    """Return the sequence of each item: longest first, into the fullest sequence that can hold it.

    Best-fit decreasing (Johnson, 1973). Items of one length are placed together: the fullest
    sequence with enough space remains the fullest one until it is full, so a sequence with `space`
    left takes `space // length` of them at once, and the work grows with the number of distinct
    lengths.

    Args:
        lengths: tokens of each item, 1 … capacity.
        capacity: tokens of a sequence.

    Returns:
        int64 [items], sequence numbers without gaps.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    sequences = np.empty(lengths.size, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    open_sequences = _OpenSequences(capacity)
    distinct, counts = np.unique(-lengths, return_counts=True)
    done = 0
    for length, count in zip((-distinct).tolist(), counts.tolist(), strict=True):
        while count:
            chosen, each = open_sequences.take(length, count)
            placed = min(count, chosen.size * each)
            sequences[order[done : done + placed]] = np.repeat(chosen, each)[:placed]
            open_sequences.put_back(chosen, each, placed, length)
            done, count = done + placed, count - placed
    return sequences


class _OpenSequences:
    """Open sequences by free space; the bits of a big integer say which spaces exist."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.opened, self.present = capacity, 0, 0
        self.by_space: dict[int, Int64s] = {}
        self._space = 0  # of the sequences taken last

    def take(self, length: int, count: int) -> tuple[Int64s, int]:
        """Sequences for up to `count` items, all with equal space, and how many items fit each."""
        fitting = self.present >> length
        if not fitting:
            return self._open(length, count)
        self._space = length + (fitting & -fitting).bit_length() - 1
        each = self._space // length
        available = self.by_space[self._space]
        needed = -(-count // each)
        self._set(self._space, available[needed:])
        return available[:needed], each

    def _open(self, length: int, count: int) -> tuple[Int64s, int]:
        self._space = self.capacity
        each = self.capacity // length
        first, self.opened = self.opened, self.opened - (-count // each)
        return np.arange(first, self.opened, dtype=np.int64), each

    def put_back(self, chosen: Int64s, each: int, placed: int, length: int) -> None:
        """Record the space left in the sequences just taken; the last may hold fewer items."""
        full = placed // each
        self._add(self._space - each * length, chosen[:full])
        self._add(self._space - (placed - full * each) * length, chosen[full:])

    def _add(self, space: int, sequences: Int64s) -> None:
        if sequences.size and space in self.by_space:
            sequences = np.concatenate([self.by_space[space], sequences])
        if sequences.size and space:
            self._set(space, sequences)

    def _set(self, space: int, sequences: Int64s) -> None:
        if sequences.size:
            self.by_space[space] = sequences
            self.present |= 1 << space
        else:
            self.by_space.pop(space, None)
            self.present &= ~(1 << space)


def pack_whole(lengths: Int64s, capacity: int, example_sizes: Int64s | None = None) -> PackingPlan:
    """Pack whole examples by best-fit decreasing; no document is cut.

    Args:
        lengths: tokens of each document, at least 1; an example's sum is at most `capacity`.
        capacity: tokens of a sequence.
        example_sizes: documents of each example, which follow one another and stay together; None
            for one each.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    sizes = np.ones(lengths.size, np.int64) if example_sizes is None else example_sizes
    first = _offsets(sizes)[:-1]
    sequence = best_fit_decreasing(_sums(lengths, sizes), capacity)
    order = np.argsort(sequence, kind="stable").astype(np.int64)
    documents = ranges(first[order], sizes[order])
    counts = _sums(sizes[order], np.bincount(sequence))
    segments = _segments(documents, np.zeros(documents.size, np.int64), lengths[documents])
    return PackingPlan(segments, _offsets(counts))


def pack_stream(lengths: Int64s, capacity: int) -> PackingPlan:
    """Concatenate documents and cut after every `capacity` tokens; every token is kept once.

    Args:
        lengths: tokens of each document, at least 1.
        capacity: tokens of a sequence; the last sequence may be shorter.
    """
    starts = _offsets(lengths)
    total = int(starts[-1])
    edges = np.unique(np.concatenate([starts, np.arange(0, total, capacity, dtype=np.int64)]))
    begin, tokens = edges[:-1], np.diff(edges)
    document = np.searchsorted(starts, begin, side="right") - 1
    segments = _segments(document, begin - starts[document], tokens)
    return PackingPlan(segments, _offsets(np.bincount(begin // capacity)))


def pack_one_document(lengths: Int64s, capacity: int) -> PackingPlan:
    """Give each document its own sequences: several if it is longer than `capacity`."""
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(lengths.size, dtype=np.int64), counts)
    index = np.arange(document.size, dtype=np.int64) - np.repeat(_offsets(counts)[:-1], counts)
    start = index * capacity
    segments = _segments(document, start, np.minimum(lengths[document] - start, capacity))
    return PackingPlan(segments, np.arange(document.size + 1, dtype=np.int64))


def pack_one_example(lengths: Int64s, example_sizes: Int64s) -> PackingPlan:
    """Give each example, whose documents follow one another, a sequence of its own."""
    documents = np.arange(len(lengths), dtype=np.int64)
    segments = _segments(documents, np.zeros_like(documents), lengths)
    return PackingPlan(segments, _offsets(example_sizes))


def keep_sequences(plan: PackingPlan, keep: NDArray[np.bool_]) -> PackingPlan:
    """Return the plan with only the sequences where `keep`, bool [sequences], is true."""
    counts = np.diff(plan.sequences)
    return PackingPlan(plan.segments[np.repeat(keep, counts)], _offsets(counts[keep]))


def _segments(document: Int64s, start: Int64s, tokens: Int64s) -> NDArray[np.void]:
    segments = np.empty(document.size, dtype=SEGMENT)
    segments["document"], segments["start"], segments["tokens"] = document, start, tokens
    return segments


def _sums(values: Int64s, counts: Int64s) -> Int64s:
    """Sums of counts[0] values, of the counts[1] after them, …"""
    return np.diff(_offsets(values)[_offsets(counts)])


def _offsets(counts: NDArray[np.integer]) -> Int64s:
    """[c0, c1, …] → [0, c0, c0 + c1, …]"""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ranges(first: Int64s, counts: Int64s) -> Int64s:
    """first[0], first[0] + 1, … (counts[0] of them), first[1], …"""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total) + np.repeat(first - ends + counts, counts)


@dataclass(frozen=True)
class Segments:
    """The segments of some sequences, in their order, before a token is read.

    Attributes:
        views: tokens of each segment, int32, as views of memory-mapped files.
        sizes: [S], tokens of each segment.
        sequences: [S], index of a segment's sequence among these (0, 1, …), ascending.
        documents, labels: [S], number and label of each segment's document.
        run_segments: [R], segment of each run of target tokens, ascending.
        run_starts, run_stops: [R], positions in that segment; a run never starts at 0.
    """

    views: list[Int32s]
    sizes: Int64s
    sequences: Int64s
    documents: Int64s
    labels: Int64s
    run_segments: Int64s
    run_starts: Int64s
    run_stops: Int64s


def join_segments(by_store: list[Segments], indices: list[Int64s]) -> Segments:
    """Interleave the segments of several stores.

    Args:
        by_store: segments of each store.
        indices: for each store, the indices of its sequences among all, ascending.
    """
    if len(by_store) == 1:
        return by_store[0]
    sequences = np.concatenate(
        [index[segments.sequences] for segments, index in zip(by_store, indices, strict=True)]
    )
    order = np.argsort(sequences, kind="stable")
    moved_to = np.empty_like(order)
    moved_to[order] = np.arange(order.size)
    first = np.cumsum([0, *(len(segments.views) for segments in by_store)])
    shifted = [s.run_segments + shift for s, shift in zip(by_store, first[:-1], strict=True)]
    run_segments = moved_to[np.concatenate(shifted)]
    run_order = np.argsort(run_segments, kind="stable")
    views = [view for segments in by_store for view in segments.views]
    return Segments(
        [views[index] for index in order.tolist()],
        np.concatenate([segments.sizes for segments in by_store])[order],
        sequences[order],
        np.concatenate([segments.documents for segments in by_store])[order],
        np.concatenate([segments.labels for segments in by_store])[order],
        run_segments[run_order],
        np.concatenate([segments.run_starts for segments in by_store])[run_order],
        np.concatenate([segments.run_stops for segments in by_store])[run_order],
    )
