"""Find training rows that contain questions or answers of a held-out set.

A held-out row is identified by its character n-grams, as n-gram decontamination does with words
(Brown et al., arXiv:2005.14165, appendix C). Only letters and digits count, so whitespace and
punctuation cannot hide a copy. The index keeps the n-grams whose hash falls in a fixed eighth, and
the smallest hashes of a text that has few of those (winnowing: Schleimer, Wilkerson and Aiken,
SIGMOD 2003). The question and the answer of a row are also indexed on their own, so that a copy of
one without the other is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.data.duplicates import UInt64s, letters_and_digits, shingle_hashes
from dtrain.data.text_checks import RowText

NGRAM = 30  # characters of an alphabet, about six words; half as many in CJK scripts
KEPT_ONE_IN = np.uint64(8)
MIN_KEPT = 4
MIN_ROW_SHARE = 0.5  # of the indexed n-grams of a held-out row
MIN_SIDE_SHARE = 0.8  # of those of its question or its answer alone
COMMON_ROWS = 3  # an n-gram in this many held-out rows is boilerplate and identifies none of them


@dataclass(frozen=True)
class HeldOutIndex:
    """The n-grams of held-out rows, by hash. A passage is a row, its question, or its answer.

    Attributes:
        hashes: sorted, [ngrams].
        passages: index of the passage of each n-gram, [ngrams].
        thresholds: n-grams of each passage that make a training row a leak, [passages].
        sizes: n-grams of each passage, [passages].
        locations: file and line of the held-out row of each passage, [passages].
    """

    hashes: UInt64s
    passages: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    sizes: NDArray[np.int64]
    locations: list[str]


def index_held_out(rows: Iterable[tuple[str, RowText]]) -> HeldOutIndex:
    """Index held-out rows, given as (location, text)."""
    locations, sides = [], []
    for location, text in rows:
        locations.append(location)
        sides.append([np.unique(_indexed_ngrams(side)) for side in _sides(text)])
    whole_rows = [np.unique(_concatenate(row)) for row in sides]
    ngrams, counts = np.unique(_concatenate(whole_rows), return_counts=True)
    common = ngrams[counts >= COMMON_ROWS]
    passages = [(hashes, row, MIN_ROW_SHARE) for row, hashes in enumerate(whole_rows)]
    for row, row_sides in enumerate(sides):
        long = [side for side in row_sides if len(row_sides) > 1 and side.size >= MIN_KEPT]
        passages += [(side, row, MIN_SIDE_SHARE) for side in long]
    distinctive = [np.setdiff1d(hashes, common, assume_unique=True) for hashes, _, _ in passages]
    # A side that is mostly boilerplate is not identified by the few n-grams that remain.
    distinctive = [
        hashes if share == MIN_ROW_SHARE or hashes.size >= MIN_KEPT else hashes[:0]
        for hashes, (_, _, share) in zip(distinctive, passages, strict=True)
    ]
    sizes = np.array([hashes.size for hashes in distinctive], np.int64)
    all_hashes = _concatenate(distinctive)
    passage_of_hash = np.repeat(np.arange(sizes.size), sizes)
    order = np.argsort(all_hashes, kind="stable")
    thresholds = sizes * np.array([share for _, _, share in passages])
    passage_locations = [locations[row] for _, row, _ in passages]
    return HeldOutIndex(
        all_hashes[order], passage_of_hash[order], thresholds, sizes, passage_locations
    )


def find_leak(text: RowText, index: HeldOutIndex) -> tuple[str, float] | None:
    """The held-out row that a training row contains most of, and the share that it contains.

    Returns:
        Location and share, or None if no passage reaches its threshold.
    """
    ngrams = np.unique(_concatenate([_all_ngrams(side) for side in _sides(text)]))
    starts = np.searchsorted(index.hashes, ngrams, side="left")
    stops = np.searchsorted(index.hashes, ngrams, side="right")
    matches = np.flatnonzero(starts < stops)
    if not matches.size:
        return None
    hits = [index.passages[starts[match] : stops[match]] for match in matches.tolist()]
    passages, counts = np.unique(np.concatenate(hits), return_counts=True)
    leaks = counts >= index.thresholds[passages]
    if not leaks.any():
        return None
    shares = np.where(leaks, counts / index.sizes[passages], 0)
    best = int(shares.argmax())
    return index.locations[int(passages[best])], float(shares[best])


def _sides(text: RowText) -> list[str]:
    sides = (letters_and_digits(text.question), letters_and_digits(text.answer))
    return [side for side in sides if side]


def _count_cjk(text: str) -> int:
    """Characters of scripts that write a word in about half as many characters."""
    if text.isascii():
        return 0
    return int((np.frombuffer(text.encode("utf-32-le"), np.uint32) > 0x2E7F).sum())


def _all_ngrams(text: str) -> UInt64s:
    """The hashes of all n-grams of a training text, of both widths if it mixes scripts."""
    cjk = _count_cjk(text)
    widths = [NGRAM] * (cjk < len(text)) + [NGRAM // 2] * (cjk > 0)
    return _concatenate([shingle_hashes([text], width)[0] for width in widths])


def _indexed_ngrams(text: str) -> UInt64s:
    """The hashes that identify a held-out text; a text shorter than an n-gram has one."""
    mostly_cjk = _count_cjk(text) * 3 >= len(text)
    hashes, _ = shingle_hashes([text], NGRAM // 2 if mostly_cjk else NGRAM)
    kept = hashes[hashes % KEPT_ONE_IN == 0]
    return kept if kept.size >= MIN_KEPT else np.sort(hashes)[:MIN_KEPT]


def _concatenate(arrays: list[UInt64s]) -> UInt64s:
    return np.concatenate([*arrays, np.empty(0, np.uint64)])
