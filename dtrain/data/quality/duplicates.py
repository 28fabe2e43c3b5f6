"""Rows that are there twice, or nearly; and questions with several answers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

NONE = -1
COMPARED_AT_ONCE = 1 << 18  # pairs, so that a set of millions of equal rows fits in memory


def first_of_each(keys: UInt64s) -> Int64s:
    """For each row the first row with the same key, [rows]."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def exact(rows: UInt64s) -> Int64s:
    """The first row that each row repeats, or NONE for the first itself, [rows]."""
    first = first_of_each(rows)
    return np.where(first == np.arange(rows.size), NONE, first)


def inconsistent(questions: UInt64s, answers: UInt64s, asked: NDArray[np.bool_]) -> Int64s:
    """The first row with the same question and another answer, or NONE, [rows].

    Args:
        questions, answers: keys of the texts.
        asked: whether the row has a question at all.
    """
    first = first_of_each(questions)
    return np.where(asked & (answers != answers[first]), first, NONE)


def near(
    bands: NDArray[np.uint32], sketches: NDArray[np.uint8], similarity: float
) -> tuple[Int64s, NDArray[np.float32]]:
    """For each row an earlier row that is nearly the same.

    Rows that share a band are candidates (locality-sensitive hashing, Indyk and Motwani, 1998);
    each is compared with the first row of its group and with the one before it, by the lowest
    byte of each MinHash value (b-bit minwise hashing, Li and König, arXiv:0910.3349).

    Args:
        bands: [rows, bands].
        sketches: lowest byte of each value of the signature, [rows, values].
        similarity: least Jaccard similarity, as estimated.

    Returns:
        Earlier row or NONE, [rows]; and the similarity to it.
    """
    rows = len(bands)
    found = np.full(rows, NONE, dtype=np.int64)
    how = np.zeros(rows, dtype=np.float32)
    for band in range(bands.shape[1] if rows else 0):
        for later, earlier in _candidates(bands[:, band]):
            fresh = found[later] == NONE
            later, earlier = later[fresh], earlier[fresh]
            alike = _similarity(sketches, later, earlier)
            good = alike >= similarity
            found[later[good]], how[later[good]] = earlier[good], alike[good]
    return found, how


def _candidates(keys: NDArray[np.uint32]) -> Iterator[tuple[Int64s, Int64s]]:
    """Pairs of rows with the same key, later and earlier, a block at a time."""
    order = np.argsort(keys, kind="stable").astype(np.int64)
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1  # places whose left is alike
    if not same.size:
        return
    heads = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    head_of = heads[np.searchsorted(heads, same, side="right") - 1]
    for start in range(0, same.size, COMPARED_AT_ONCE):
        piece = slice(start, start + COMPARED_AT_ONCE)
        yield order[same[piece]], order[head_of[piece]]
        yield order[same[piece]], order[same[piece] - 1]


def _similarity(sketches: NDArray[np.uint8], one: Int64s, other: Int64s) -> NDArray[np.float32]:
    """Estimated Jaccard similarity of pairs of rows; bytes agree by chance once in 256."""
    agree = (sketches[one] == sketches[other]).mean(axis=1, dtype=np.float32)
    return np.maximum((agree - 1 / 256) / (1 - 1 / 256), 0).astype(np.float32)
