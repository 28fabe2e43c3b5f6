"""Training rows that hold what a held-out set asks or answers.

A held-out row is known by the runs of characters in it, as n-gram decontamination does with words
(Brown et al., arXiv:2005.14165, appendix C); letters and digits alone count, so that neither
blanks nor punctuation hide a copy. Of a held-out text only the runs whose hash falls in a fixed
eighth are kept, and the least ones of a text that has few of those (as winnowing does: Schleimer,
Wilkerson and Aiken, SIGMOD 2003). A question or an answer that is there without the other is found
by its own runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.data_quality.sample import Sample
from dtrain.data_quality.shingles import UInt64s, bare, run_hashes

RUN = 30  # letters of an alphabet, some six words; half of it in Chinese, Japanese, Korean
KEPT_OF = np.uint64(8)
LEAST_KEPT = 4
LEAST_SHARE = 0.5  # of the kept runs of a held-out row
SIDE_SHARE = 0.8  # of those of its question or its answer alone
COMMON = 3  # held-out rows that share a run: it is their common wording and tells nothing


@dataclass(frozen=True)
class HeldOut:
    """Runs of the held-out rows, by hash; a piece is a row, its question, or its answer.

    Attributes:
        hashes: sorted, [runs].
        pieces: piece of each run, [runs].
        needs: runs of each piece that a row must hold to be a leak, [pieces].
        sizes: runs of each piece, [pieces].
        places: name of the held-out row of each piece, [pieces].
    """

    hashes: UInt64s
    pieces: NDArray[np.int64]
    needs: NDArray[np.float64]
    sizes: NDArray[np.int64]
    places: list[str]


def held_out(samples: Iterable[tuple[str, Sample]]) -> HeldOut:
    """The runs of held-out rows, each given as (place, sample)."""
    places, sides = [], []
    for place, sample in samples:
        places.append(place)
        sides.append([np.unique(_kept(text)) for text in _texts(sample)])
    wholes = [np.unique(_joined(one)) for one in sides]
    runs, counts = np.unique(_joined(wholes), return_counts=True)
    common = runs[counts >= COMMON]
    pieces = [(whole, row, LEAST_SHARE) for row, whole in enumerate(wholes)]
    for row, one in enumerate(sides):
        long = [side for side in one if len(one) > 1 and side.size >= LEAST_KEPT]
        pieces += [(side, row, SIDE_SHARE) for side in long]
    telling = [np.setdiff1d(piece, common, assume_unique=True) for piece, _, _ in pieces]
    # What is mostly common wording tells nothing by the little that is left of it.
    telling = [
        own if share == LEAST_SHARE or own.size >= LEAST_KEPT else own[:0]
        for own, (_, _, share) in zip(telling, pieces, strict=True)
    ]
    sizes = np.array([own.size for own in telling], np.int64)
    every, owner = _joined(telling), np.repeat(np.arange(sizes.size), sizes)
    order = np.argsort(every, kind="stable")
    needs = sizes * np.array([share for _, _, share in pieces])
    names = [places[row] for _, row, _ in pieces]
    return HeldOut(every[order], owner[order], needs, sizes, names)


def leaked(sample: Sample, known: HeldOut) -> tuple[str, float] | None:
    """The held-out row that a training row holds most of, and how much of it; None if little."""
    runs = np.unique(_joined([_runs(text) for text in _texts(sample)]))
    starts = np.searchsorted(known.hashes, runs, side="left")
    stops = np.searchsorted(known.hashes, runs, side="right")
    hit = np.flatnonzero(starts < stops)
    if not hit.size:
        return None
    hits = [known.pieces[starts[one] : stops[one]] for one in hit.tolist()]
    pieces, counts = np.unique(np.concatenate(hits), return_counts=True)
    enough = counts >= known.needs[pieces]
    if not enough.any():
        return None
    shares = np.where(enough, counts / known.sizes[pieces], 0)
    best = int(shares.argmax())
    return known.places[int(pieces[best])], float(shares[best])


def _texts(sample: Sample) -> list[str]:
    return [text for text in (bare(sample.question), bare(sample.answer)) if text]


def _wide(text: str) -> int:
    """How many of its characters are of scripts that need half as many for a word."""
    if text.isascii():
        return 0
    return int((np.frombuffer(text.encode("utf-32-le"), np.uint32) > 0x2E7F).sum())


def _runs(text: str) -> UInt64s:
    """The hashes of all runs of a training text, of both widths where it mixes scripts."""
    wide = _wide(text)
    widths = [RUN] * (wide < len(text)) + [RUN // 2] * (wide > 0)
    return _joined([run_hashes([text], width)[0] for width in widths])


def _kept(text: str) -> UInt64s:
    """The hashes that a held-out text is known by; of one shorter than a run, its only one."""
    mostly_wide = _wide(text) * 3 >= len(text)
    hashes, _ = run_hashes([text], RUN // 2 if mostly_wide else RUN)
    chosen = hashes[hashes % KEPT_OF == 0]
    return chosen if chosen.size >= LEAST_KEPT else np.sort(hashes)[:LEAST_KEPT]


def _joined(arrays: list[UInt64s]) -> UInt64s:
    return np.concatenate([*arrays, np.empty(0, np.uint64)])
