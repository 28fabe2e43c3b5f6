"""A batch of rows into what a scan keeps of it: keys, sketches, flags and a few notes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from dtrain.data.quality import personal, variety, wording
from dtrain.data.quality.kinds import BIT, LEAK
from dtrain.data.quality.languages import language
from dtrain.data.quality.leaks import HeldOut, leaked
from dtrain.data.quality.sample import Sample, sample_of
from dtrain.data.quality.shingles import bands, plain, signatures
from dtrain.data.rows import Value

NOTES = 20  # kept of each kind, the worst ones

# How bad, row of the batch, what was seen.
Note = tuple[float, int, str]


@dataclass
class Examined:
    """What is known of a batch of rows.

    Attributes:
        keys: whole, question and answer, without regard to case and blanks, [rows, 3].
        bands, sketches: of `shingles.bands`, and the lowest byte of each signature value.
        starts: key of how the question begins, [rows].
        characters: of question and answer, [rows, 2].
        flags: bits of `kinds.BIT`, [rows].
        asked: rows that have a question, [rows].
        notes: by kind.
        languages, orders, openings: counts.
    """

    keys: NDArray[np.uint64]
    bands: NDArray[np.uint32]
    sketches: NDArray[np.uint8]
    starts: NDArray[np.uint64]
    characters: NDArray[np.int32]
    flags: NDArray[np.uint32]
    asked: NDArray[np.bool_]
    notes: dict[str, list[Note]]
    languages: Counter[str]
    orders: Counter[tuple[str, str] | str]
    openings: Counter[tuple[str, str] | str]


_known: list[HeldOut | None] = [None]  # of this process, where it does nothing but examine


def remember(known: HeldOut | None) -> None:
    """Keep the held-out data for every `examine_here` of this process."""
    _known[0] = known


def examine_here(values: list[Value]) -> Examined:
    """`examine` in a process of its own; what this module imports, such a process waits for."""
    return examine(values, _known[0])


def examine(values: list[Value], known: HeldOut | None) -> Examined:
    """Check every row of a batch by itself, and sketch it for what only all rows show."""
    samples = [sample_of(value) for value in values]
    matrix = signatures([plain(sample.whole) for sample in samples])
    openings = [variety.start(sample.question) for sample in samples]
    orders = (variety.verb_object(sample.question) for sample in samples)
    flags, notes = _findings(samples, known)
    return Examined(
        keys=np.array([_keys(sample) for sample in samples], np.uint64).reshape(-1, 3),
        bands=bands(matrix),
        sketches=matrix.astype(np.uint8),
        starts=np.array([key(opening) for opening in openings], np.uint64),
        characters=np.array([(len(s.question), len(s.answer)) for s in samples], np.int32),
        flags=flags,
        asked=np.array([not sample.is_text for sample in samples], bool),
        notes=notes,
        languages=Counter(language(sample.answer or sample.question) for sample in samples),
        orders=Counter(order for order in orders if order),
        openings=Counter(opening for opening in openings if opening),
    )


def key(text: str) -> int:
    """64 bits of a text."""
    return xxhash.xxh3_64_intdigest(text.encode())


def _keys(sample: Sample) -> tuple[int, int, int]:
    return key(plain(sample.whole)), key(plain(sample.question)), key(plain(sample.answer))


def _findings(
    samples: list[Sample], known: HeldOut | None
) -> tuple[NDArray[np.uint32], dict[str, list[Note]]]:
    flags = np.zeros(len(samples), dtype=np.uint32)
    notes: dict[str, list[Note]] = {}
    for row, sample in enumerate(samples):
        for kind, note, weight in findings(sample, known):
            flags[row] |= BIT[kind]
            notes.setdefault(kind, []).append((weight, row, note))
    return flags, {kind: heapq.nlargest(NOTES, found) for kind, found in notes.items()}


def findings(sample: Sample, known: HeldOut | None) -> Iterator[wording.Fault]:
    """All that a row shows by itself: kind, what was seen, how bad it is among its kind."""
    yield from wording.faults(sample)
    yield from _personal(sample.whole)
    if known and (leak := leaked(sample, known)):
        yield LEAK, f"{leak[1]:.0%} of {leak[0]}", leak[1]


def _personal(text: str) -> Iterator[wording.Fault]:
    found = personal.find(text)
    for kind in dict.fromkeys(one.kind for one in found):
        same = [one for one in found if one.kind == kind]
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        yield kind, personal.hidden(text, same[0]) + more, len(same)
