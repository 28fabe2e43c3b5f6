"""Check a batch of rows: keys, sketches, flags, and notes on the most severe findings."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dtrain.data.duplicates import minhash_signatures, normalize_text, text_key
from dtrain.data.formats import RowContent
from dtrain.data.row_text import RowText, row_text
from dtrain.data.text_checks import Finding, check_quality
from dtrain.data_quality import pii
from dtrain.data_quality.decontamination import HeldOutIndex, find_leak
from dtrain.data_quality.diversity import detect_language, opening, verb_object
from dtrain.data_quality.finding_types import FLAG_BITS, LEAK
from dtrain.data_quality.scan_result import MAX_NOTES, ROW, CheckedBatch, RowNote

_held_out: list[HeldOutIndex | None] = [None]  # of a worker process


def init_worker(held_out: HeldOutIndex | None) -> None:
    """Keep the held-out index for every `check_batch_in_worker` of this process."""
    _held_out[0] = held_out


def check_batch_in_worker(values: list[RowContent]) -> CheckedBatch:
    """Run `check_batch` in a worker process, whose start has to import this module."""
    return check_batch(values, _held_out[0])


def check_batch(values: list[RowContent], held_out: HeldOutIndex | None) -> CheckedBatch:
    """Check each row on its own, and compute the keys that the checks across rows need."""
    texts = [row_text(value) for value in values]
    openings = [opening(text.question) for text in texts]
    actions = (verb_object(text.question) for text in texts)
    normalized = [normalize_text(text.full) for text in texts]
    rows = np.zeros(len(texts), ROW)
    rows["flags"], notes = _check_rows(texts, held_out)
    rows["sketch"] = minhash_signatures(normalized).astype(np.uint8)
    rows["text"] = [text_key(text) for text in normalized]
    rows["question"] = [text_key(normalize_text(text.question)) for text in texts]
    rows["answer"] = [text_key(normalize_text(text.answer)) for text in texts]
    rows["opening"] = [text_key(opening) for opening in openings]
    rows["question_characters"] = [len(text.question) for text in texts]
    rows["answer_characters"] = [len(text.answer) for text in texts]
    rows["asked"] = [not text.is_text for text in texts]
    return CheckedBatch(
        rows,
        notes=notes,
        languages=Counter(detect_language(text.answer or text.question) for text in texts),
        actions=Counter(action for action in actions if action),
        openings=Counter(opening for opening in openings if opening),
    )


def _check_rows(
    texts: list[RowText], held_out: HeldOutIndex | None
) -> tuple[NDArray[np.uint32], dict[str, list[RowNote]]]:
    flags = np.zeros(len(texts), dtype=np.uint32)
    notes: dict[str, list[RowNote]] = {}
    for row, text in enumerate(texts):
        for kind, note, severity in check_row(text, held_out):
            flags[row] |= FLAG_BITS[kind]
            notes.setdefault(kind, []).append(RowNote(severity, row, note))
    return flags, {kind: heapq.nlargest(MAX_NOTES, all_notes) for kind, all_notes in notes.items()}


def check_row(text: RowText, held_out: HeldOutIndex | None) -> Iterator[Finding]:
    """Yield everything that a row shows on its own: text quality, personal data, and leaks."""
    yield from check_quality(text)
    matches = pii.find_pii(text.full)
    for kind in dict.fromkeys(match.kind for match in matches):
        first, *rest = [match for match in matches if match.kind == kind]
        note = pii.redact(text.full, first) + (f" and {len(rest)} more" if rest else "")
        yield Finding(kind, note, 1 + len(rest))
    if held_out and (leak := find_leak(text, held_out)):
        location, share = leak
        yield Finding(LEAK, f"contains {share:.0%} of {location}", share)
