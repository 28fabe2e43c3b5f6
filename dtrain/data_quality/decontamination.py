"""Find training rows that contain questions or answers of a held-out set.

A held-out row is identified by its character n-grams, as n-gram decontamination does with words
(Brown et al., arXiv:2005.14165, appendix C). Only letters and digits count, so whitespace and
punctuation cannot hide a copy. A row that shares enough of them is then compared word by word: a
question from the same template, with another number or another word that matters, is no copy
(`content_tokens.py`). The index keeps the n-grams whose hash falls in a fixed eighth, and
the smallest hashes of a text that has few of those (winnowing: Schleimer, Wilkerson and Aiken,
SIGMOD 2003). The question and the answer of a row are also indexed on their own, so that a copy of
one without the other is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from dtrain.data.duplicates import UInt64s, letters_and_digits, shingle_hashes
from dtrain.data.text_checks import RowText
from dtrain.data_quality.content_tokens import PassageMatch, compare, numbers, tokens

NGRAM = 30  # characters of an alphabet, about six words; half as many in CJK scripts
KEPT_ONE_IN = np.uint64(8)
MIN_KEPT = 4
MIN_NGRAM_SHARE = 0.3  # of the indexed n-grams of a passage, for a look at its words
MIN_ROW_SHARE = 0.5  # of the tokens of a held-out row
MIN_SIDE_SHARE = 0.8  # of those of its question or its answer alone
TEMPLATE_SHARE = 0.6  # of a question's tokens that make another one recognizable as its variant
MAX_COMPARED = 8  # held-out passages that a row is compared with, the most similar ones
COMMON_ROWS = 3  # an n-gram in this many held-out rows is boilerplate and identifies none of them


class Passage(Enum):
    """What is looked for in a training row."""

    ROW = auto()
    QUESTION = auto()
    ANSWER = auto()


@dataclass(frozen=True)
class HeldOutIndex:
    """The n-grams of held-out rows, by hash. A passage is a row, its question, or its answer.

    Attributes:
        hashes: sorted, [ngrams].
        passages: index of the passage of each n-gram, [ngrams].
        sizes: n-grams of each passage, [passages].
        rows: index of the held-out row of each passage, [passages].
        kinds: of each passage, [passages].
        locations, texts: file and line of each held-out row, and its text, [rows].
    """

    hashes: UInt64s
    passages: NDArray[np.int64]
    sizes: NDArray[np.int64]
    rows: list[int]
    kinds: list[Passage]
    locations: list[str]
    texts: list[RowText]


def index_held_out(rows: Iterable[tuple[str, RowText]]) -> HeldOutIndex:
    """Index held-out rows, given as (location, text)."""
    locations, texts, sides = [], [], []
    for location, text in rows:
        locations.append(location)
        texts.append(text)
        sides.append([(kind, np.unique(_indexed_ngrams(side))) for kind, side in _sides(text)])
    whole_rows = [np.unique(_concatenate([side for _, side in row])) for row in sides]
    ngrams, counts = np.unique(_concatenate(whole_rows), return_counts=True)
    common = ngrams[counts >= COMMON_ROWS]
    passages = [(hashes, row, Passage.ROW) for row, hashes in enumerate(whole_rows)]
    for row, row_sides in enumerate(sides):
        long = [x for x in row_sides if len(row_sides) > 1 and x[1].size >= MIN_KEPT]
        passages += [(side, row, kind) for kind, side in long]
    distinctive = [np.setdiff1d(hashes, common, assume_unique=True) for hashes, _, _ in passages]
    # A side that is mostly boilerplate is not identified by the few n-grams that remain.
    distinctive = [
        hashes if kind is Passage.ROW or hashes.size >= MIN_KEPT else hashes[:0]
        for hashes, (_, _, kind) in zip(distinctive, passages, strict=True)
    ]
    sizes = np.array([hashes.size for hashes in distinctive], np.int64)
    all_hashes = _concatenate(distinctive)
    passage_of_hash = np.repeat(np.arange(sizes.size), sizes)
    order = np.argsort(all_hashes, kind="stable")
    return HeldOutIndex(
        all_hashes[order],
        passage_of_hash[order],
        sizes,
        [row for _, row, _ in passages],
        [kind for _, _, kind in passages],
        locations,
        texts,
    )


def find_leak(text: RowText, index: HeldOutIndex) -> tuple[str, float] | None:
    """The held-out row that a training row contains most of, and the share that it contains.

    Returns:
        Location and share of its words, or None if the row contains none.
    """
    candidates = _candidates(text, index)
    if not candidates:
        return None
    asked, answered = tokens(text.question), tokens(text.answer)
    copies = []
    for passage in candidates:
        row, kind = index.rows[passage], index.kinds[passage]
        if share := _copied_share(index.texts[row], kind, asked, answered):
            copies.append((share, index.locations[row]))
    if not copies:
        return None
    share, location = max(copies, key=lambda copy: copy[0])
    return location, share


def _candidates(text: RowText, index: HeldOutIndex) -> list[int]:
    """The passages that a row shares enough n-grams with, most similar first."""
    ngrams = np.unique(_concatenate([_all_ngrams(side) for _, side in _sides(text)]))
    starts = np.searchsorted(index.hashes, ngrams, side="left")
    stops = np.searchsorted(index.hashes, ngrams, side="right")
    matches = np.flatnonzero(starts < stops)
    if not matches.size:
        return []
    hits = [index.passages[starts[match] : stops[match]] for match in matches.tolist()]
    passages, counts = np.unique(np.concatenate(hits), return_counts=True)
    shares = counts / index.sizes[passages]
    best = np.argsort(-shares, kind="stable")[:MAX_COMPARED]
    return [int(passages[at]) for at in best if shares[at] >= MIN_NGRAM_SHARE]


def _copied_share(held_out: RowText, kind: Passage, asked: list[str], answered: list[str]) -> float:
    """The share of a held-out passage that a training row contains; 0 if it says something else.

    Args:
        asked, answered: tokens of the training row's question and answer.
    """
    held_question, held_answer = tokens(held_out.question), tokens(held_out.answer)
    question = compare(held_question, [*asked, *answered])
    answer = compare(held_answer, [*asked, *answered])
    if kind is Passage.QUESTION:
        return question.share * (question.share >= MIN_SIDE_SHARE and not question.is_varied)
    if kind is Passage.ANSWER:
        is_copy = answer.share >= MIN_SIDE_SHARE and not answer.is_varied
        other = compare(held_question, asked)
        asks_other = other.share >= TEMPLATE_SHARE and other.numbers
        # The same answer without a number may be right for many questions of a template.
        return answer.share * (is_copy and (bool(numbers(held_answer)) or not asks_other))
    whole = PassageMatch(*(a + b for a, b in zip(astuple(question), astuple(answer), strict=True)))
    is_copy = whole.share >= MIN_ROW_SHARE and not (question.is_varied or answer.is_varied)
    return whole.share * is_copy


def _sides(text: RowText) -> list[tuple[Passage, str]]:
    sides = ((Passage.QUESTION, text.question), (Passage.ANSWER, text.answer))
    return [(kind, plain) for kind, side in sides if (plain := letters_and_digits(side))]


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
