"""Accept the replies that make rows worth training on, and reject the others with a reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dtrain.augmentation.prompts import (
    Mode,
    SourceRow,
    apply_reply,
    clean_reply,
    comparison_text,
)
from dtrain.data.conversations import Preference
from dtrain.data.duplicates import (
    NEAR_SIMILARITY,
    exact_duplicates,
    minhash_signatures,
    near_duplicates,
    normalize_text,
    text_key,
)
from dtrain.data.permutation import mix64
from dtrain.data.text_checks import (
    CUT_OFF,
    EMPTY,
    GARBLED,
    REFUSAL,
    REPEATED,
    SAME,
    RowText,
    check_quality,
    row_text,
)

REJECTED_KINDS = {EMPTY, SAME, GARBLED, REPEATED, REFUSAL, CUT_OFF}
TEXTS_PER_BATCH = 1000
NO_MATCH = -1

Replies = dict[int, dict[int, tuple[str, str]]]  # row → copy → (text, finish reason)


@dataclass(frozen=True)
class GeneratedRow:
    """A row that a reply made, and why it is rejected, if it is.

    Attributes:
        row: the source row with its new value.
        copy: index of the reply among those to the row.
        reason: kind of the finding; empty if the row is accepted.
        note: details of the finding.
    """

    row: SourceRow
    copy: int
    reason: str = ""
    note: str = ""


class DuplicateIndex:
    """Texts in groups, 136 bytes each; texts of different groups are never compared."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, str]] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._groups: list[NDArray[np.uint64]] = []
        self._sketches: list[NDArray[np.uint8]] = []

    def add(self, group: int, text: str) -> None:
        """Add a text; `find_earlier` answers in the order in which texts were added."""
        self._pending.append((group, normalize_text(text)))
        if len(self._pending) >= TEXTS_PER_BATCH:
            self._hash_pending()

    def find_earlier(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Find an equal or similar earlier text for each text.

        Returns:
            Index of the earlier text or NO_MATCH, and the similarity (1 for equal texts only).
        """
        self._hash_pending()
        if not self._keys:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        keys, groups = np.concatenate(self._keys), np.concatenate(self._groups)
        matches = np.full(len(keys), NO_MATCH)
        similarity = np.zeros(len(keys), np.float32)
        for later, first in exact_duplicates(keys ^ groups):
            matches[later], similarity[later] = first, 1
        equal = matches != NO_MATCH
        sketches = np.concatenate(self._sketches)
        for later, earlier, estimate in near_duplicates(sketches, NEAR_SIMILARITY, equal, groups):
            matches[later] = earlier
            similarity[later] = np.minimum(estimate, np.float32(0.999))
        return matches, similarity

    def _hash_pending(self) -> None:
        if not self._pending:
            return
        texts = [text for _, text in self._pending]
        groups = mix64(np.array([group for group, _ in self._pending], np.uint64))
        self._keys.append(np.array([text_key(text) for text in texts], np.uint64))
        self._groups.append(groups)
        self._sketches.append(minhash_signatures(texts).astype(np.uint8))
        self._pending = []


def filter_replies(
    source: Iterable[SourceRow], replies: Replies, mode: Mode
) -> Iterator[GeneratedRow]:
    """Yield all generated rows, in the order of the source and of the copies.

    Args:
        source: all its rows, in order.
        replies: row → copy → (text, finish reason).
        mode: what the replies were asked for.
    """
    index, locations = DuplicateIndex(), []
    generated: list[GeneratedRow] = []
    for row in source:
        if text := comparison_text(row, mode):
            index.add(*text)
            locations.append(row.location)
        for copy, (reply, finish) in sorted(replies.get(row.index, {}).items()):
            new_row = replace(row, value=apply_reply(row.value, mode, reply))
            reason, note = _rejection(new_row, clean_reply(reply, mode), finish)
            generated.append(GeneratedRow(new_row, copy, reason, note))
    source_texts = len(locations)
    for candidate in generated:
        if text := _text_to_compare(candidate, mode):
            index.add(*text)
            locations.append(f"the row generated from {candidate.row.location}")
    matches, similarity = index.find_earlier()
    position = source_texts
    for candidate in generated:
        if not _text_to_compare(candidate, mode):
            yield candidate
            continue
        if matches[position] == NO_MATCH:
            yield candidate
        else:
            reason = "exact_duplicate" if similarity[position] == 1 else "near_duplicate"
            note = f"{similarity[position]:.0%} similar to {locations[int(matches[position])]}"
            yield replace(candidate, reason=reason, note=note)
        position += 1


def _text_to_compare(candidate: GeneratedRow, mode: Mode) -> tuple[int, str] | None:
    return None if candidate.reason else comparison_text(candidate.row, mode)


def _rejection(row: SourceRow, reply: str, finish: str) -> tuple[str, str]:
    """Kind and details of the first problem of a new row; both empty if there is none."""
    if finish == "length":
        return CUT_OFF, "the reply reached the maximum length"
    # The only answer of such a row is a bad one on purpose.
    only_rejected = isinstance(row.value, Preference) and row.value.chosen is None
    for finding in check_quality(row_text(row.value)):
        if finding.kind in ({EMPTY} if only_rejected else REJECTED_KINDS):
            return finding.kind, finding.note
    for finding in check_quality(RowText("?", reply)):
        if finding.kind == REFUSAL:  # the model refused to write an instruction
            return finding.kind, finding.note
    return "", ""
