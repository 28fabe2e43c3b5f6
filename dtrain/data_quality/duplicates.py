"""Rows that are there twice, or nearly; and questions with several answers.

Rows are named by their numbers. What is found comes in blocks, and rows are sorted a part at a
time: beside the columns they are given, these functions need little memory however many rows
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from dtrain.data.permutation import mix64

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

BAND = 6  # bytes of a sketch that two rows must share to be compared
COMPARED_AT_ONCE = 1 << 14  # pairs
SORTED_AT_ONCE, MOST_PARTS = 1 << 16, 16  # rows, as far as 16 parts of all of them go
READ_AT_ONCE = 1 << 16  # rows


def exact(keys: UInt64s) -> Iterator[tuple[Int64s, Int64s]]:
    """Rows that repeat an earlier one, and the first with the same key."""
    for later, first, _ in _same(lambda block: keys[block], len(keys)):
        yield later, first


def distinct(keys: UInt64s) -> int:
    """How many different keys there are."""
    return len(keys) - sum(later.size for later, _ in exact(keys))


def inconsistent(
    questions: UInt64s, answers: UInt64s, asked: NDArray[np.bool_]
) -> Iterator[tuple[Int64s, Int64s]]:
    """Rows with another answer than the first row with the same question, and that row.

    Args:
        questions, answers: keys of the texts.
        asked: whether the row has a question at all.
    """
    for later, first in exact(questions):
        differ = asked[later] & (answers[later] != answers[first])
        yield later[differ], first[differ]


def near(
    sketches: NDArray[np.uint8],
    similarity: float,
    done: NDArray[np.bool_],
    groups: UInt64s | None = None,
) -> Iterator[tuple[Int64s, Int64s, NDArray[np.float32]]]:
    """Rows that are nearly the same as an earlier row, that row, and how much they are alike.

    Rows that share a band are candidates (locality-sensitive hashing, Indyk and Motwani, 1998);
    each is compared with the first row of its band and with the one before it, by the lowest
    byte of each MinHash value (b-bit minwise hashing, Li and König, arXiv:0910.3349). The six
    bytes of a band are alike by chance as rarely as 48 random bits.

    Args:
        sketches: lowest byte of each value of the signature, [rows, values].
        similarity: least Jaccard similarity, as estimated.
        done: rows that are not looked for, [rows]; those that are found are added.
        groups: rows of different groups are never alike, [rows].
    """
    for first_byte in range(0, sketches.shape[1], BAND):

        def keys(block: slice, first_byte: int = first_byte) -> UInt64s:
            wide = np.zeros((len(sketches[block]), 8), np.uint8)
            wide[:, :BAND] = sketches[block, first_byte : first_byte + BAND]
            mixed = mix64(wide.view(np.uint64)[:, 0])
            return mixed if groups is None else mixed ^ groups[block]

        for later, first, before in _same(keys, len(sketches)):
            for earlier in (first, before):
                left = ~done[later]
                fresh, candidates = later[left], earlier[left]
                alike = _similarity(sketches, fresh, candidates)
                good = alike >= similarity
                done[fresh[good]] = True
                yield fresh[good], candidates[good], alike[good]


def _same(keys: Callable[[slice], UInt64s], rows: int) -> Iterator[tuple[Int64s, Int64s, Int64s]]:
    """Rows with the key of an earlier row; the first with that key; and the one just before."""
    parts = min(rows // SORTED_AT_ONCE + 1, MOST_PARTS)
    for part in range(parts):
        numbers, own = _part(keys, rows, part, parts)
        order = np.argsort(own, kind="stable")
        own, numbers = own[order], numbers[order]
        same = np.flatnonzero(own[1:] == own[:-1]) + 1
        heads = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]]))
        for start in range(0, same.size, COMPARED_AT_ONCE):
            place = same[start : start + COMPARED_AT_ONCE]
            head = heads[heads.searchsorted(place, side="right") - 1]
            yield numbers[place], numbers[head], numbers[place - 1]


def _part(
    keys: Callable[[slice], UInt64s], rows: int, part: int, parts: int
) -> tuple[Int64s, UInt64s]:
    """The rows whose key falls into a part, rising, and their keys."""
    numbers, own = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for start in range(0, rows, READ_AT_ONCE):
        block = keys(slice(start, min(start + READ_AT_ONCE, rows)))
        here = np.flatnonzero(block % np.uint64(parts) == part)
        numbers.append(here + start)
        own.append(block[here])
    return np.concatenate(numbers), np.concatenate(own)


def _similarity(sketches: NDArray[np.uint8], one: Int64s, other: Int64s) -> NDArray[np.float32]:
    """Estimated Jaccard similarity of pairs of rows; bytes agree by chance once in 256."""
    agree = (sketches[one] == sketches[other]).mean(axis=1, dtype=np.float32)
    return np.maximum((agree - 1 / 256) / (1 - 1 / 256), 0).astype(np.float32)
