"""Training rows that hold what a held-out set asks or answers.

A held-out row is known by the runs of characters in it, as n-gram decontamination does with words
(Brown et al., arXiv:2005.14165, appendix C); letters and digits alone count, so that neither
blanks nor punctuation hide a copy. Of all runs only those whose hash falls in a fixed eighth are
kept, the same ones on both sides (winnowing's idea: Schleimer, Wilkerson and Aiken, SIGMOD 2003).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtrain.data.quality.sample import Sample
from dtrain.data.quality.shingles import UInt64s, bare, run_hashes

RUN = 30  # letters of an alphabet, some six words; half of it in Chinese, Japanese, Korean
KEPT_OF = np.uint64(8)
LEAST_SHARE = 0.5  # of the kept runs of a held-out row
COMMON = 3  # held-out rows that share a run: it is their common wording and tells nothing


@dataclass(frozen=True)
class HeldOut:
    """Runs of the held-out rows, by hash.

    Attributes:
        hashes: sorted, [runs].
        rows: held-out row of each run, [runs].
        sizes: runs of each held-out row, [rows].
        places: name of each held-out row, [rows].
    """

    hashes: UInt64s
    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: list[str]


def held_out(samples: Iterable[tuple[str, Sample]]) -> HeldOut:
    """The runs of held-out rows, each given as (place, sample)."""
    places, hashes, rows = [], [], []
    for number, (place, sample) in enumerate(samples):
        places.append(place)
        own = np.unique(_kept(_texts(sample)))
        hashes.append(own)
        rows.append(np.full(own.size, number, dtype=np.int64))
    every = np.concatenate([*hashes, np.empty(0, np.uint64)])
    owner = np.concatenate([*rows, np.empty(0, np.int64)])
    order = np.argsort(every, kind="stable")
    every, owner = every[order], owner[order]
    _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
    telling = counts[inverse] < COMMON if every.size else np.empty(0, bool)
    every, owner = every[telling], owner[telling]
    return HeldOut(every, owner, np.bincount(owner, minlength=len(places)), places)


def leaked(sample: Sample, known: HeldOut) -> tuple[str, float] | None:
    """The held-out row that a training row holds most of, and how much of it; None if little."""
    runs = np.unique(_kept(_texts(sample)))
    if not runs.size or not known.hashes.size:
        return None
    starts = np.searchsorted(known.hashes, runs, side="left")
    stops = np.searchsorted(known.hashes, runs, side="right")
    hits = [known.rows[a:b] for a, b in zip(starts, stops, strict=True) if a < b]
    if not hits:
        return None
    rows, counts = np.unique(np.concatenate(hits), return_counts=True)
    shares = counts / known.sizes[rows]
    best = int(shares.argmax())
    if shares[best] < LEAST_SHARE:
        return None
    return known.places[int(rows[best])], float(shares[best])


def _texts(sample: Sample) -> list[str]:
    return [text for text in (bare(sample.question), bare(sample.answer)) if text]


def _kept(texts: list[str]) -> UInt64s:
    """The hashes of the runs that count; of a text shorter than a run, its only one."""
    found = [np.empty(0, np.uint64)]
    for text in texts:
        width = (
            RUN
            if sum(char > "\u2e7f" for char in text[:200]) * 3 < min(len(text), 200)
            else RUN // 2
        )
        hashes, _ = run_hashes([text], width)
        found.append(hashes if hashes.size == 1 else hashes[hashes % KEPT_OF == 0])
    return np.concatenate(found)
