"""Encode preference rows: the two answers of a pair, or a rated answer.

The documents of a row share a sequence (`Packing.WHOLE`). Only answers are targets: turns that both
sides of a pair begin with are part of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dtrain.data.conversations import Conversation
from dtrain.data.preferences import (
    both_sides,
    only_side,
    pair_problem,
    prompt_length,
    shared_turns,
)
from dtrain.data.records import Record
from dtrain.data.tokenize import (
    DESIRABLE,
    MASKED,
    NO_ROOM,
    TOO_LONG,
    TRUNCATED,
    UNDESIRABLE,
    AnswerEncoder,
    Document,
    overlong_error,
    truncate,
)

REJECTED, CHOSEN, UNRELATED = 0, 1, 2  # labels of documents


class ExampleEncoder(AnswerEncoder):
    """Encodes rows that become several documents, which share a sequence or are left out."""

    settings = ("overlong", "train_on")
    documents_per_row = 2

    def encode_sides(
        self, rows: Sequence[tuple[Record, Conversation]], counts: Counter[str]
    ) -> list[Document]:
        """Tokenize a conversation of each row."""
        return self.encode([replace(record, value=side) for record, side in rows], counts)


class PairEncoder(ExampleEncoder):
    """Two documents per row: the prompt with the chosen answer, then with the rejected one."""

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        pairs = []
        for record in records:
            chosen, rejected = both_sides(record.value)
            if problem := pair_problem(chosen, rejected):
                counts[problem] += 1
                continue
            shared = shared_turns(chosen, rejected)
            pairs.append((record, _untrained(chosen, shared), _untrained(rejected, shared)))
        flat = [(record, side) for record, *both in pairs for side in both]
        encoded = iter(self.encode_sides(flat, counts))
        documents = []
        for record, *_ in pairs:
            pair = [replace(next(encoded), label=label) for label in (CHOSEN, REJECTED)]
            documents += self.fit_pair(pair, record, counts)
        return documents

    def fit_pair(
        self, pair: list[Document], record: Record, counts: Counter[str]
    ) -> list[Document]:
        """The documents of a pair, cut where they exceed a sequence; none if an answer is lost.

        Raises:
            UserError: they are too long, and `overlong` is `fail`.
        """
        total, limit = sum(d.tokens.size for d in pair), self.sequence_length
        if total > limit:
            if self.overlong == "fail":
                raise overlong_error(total, limit, self.location(record))
            if self.overlong == "truncate":
                limits = share_sequence([d.tokens.size for d in pair], limit)
                pair = [truncate(d, n) for d, n in zip(pair, limits, strict=True)]
            if self.overlong == "drop" or not all(d.target_runs.size for d in pair):
                counts[TOO_LONG] += 1
                return []
            counts[TRUNCATED] += 1
        if not all(d.target_runs.size for d in pair):
            counts[MASKED] += 1
            return []
        return pair


class RatedAnswerEncoder(ExampleEncoder):
    """Two documents per row: the answer, and the prompt with the answer of the next row.

    The second estimates how far the model has moved from its reference on unrelated answers
    (KTO's baseline, arXiv:2402.01306, section 4.1). It takes the room that the first leaves in a
    sequence, and is left out where there is none: no rated answer is lost for it.
    """

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        rated = [(record, *only_side(record.value)) for record in records]
        answers = self.encode_sides(
            [(r, with_last_answer_only(side)) for r, side, _ in rated], counts
        )
        others = [rated[(i + 1) % len(rated)][1] for i in range(len(rated))]  # one alone: itself
        mixed = [
            (record, with_last_answer_only(with_answer_of(side, other)))
            for (record, side, _), other in zip(rated, others, strict=True)
        ]
        unrelated = self.encode_sides(mixed, Counter())
        documents = []
        for (record, _, desirable), answer, other in zip(rated, answers, unrelated, strict=True):
            if fitting := self.fit(answer, self.location(record), counts):
                documents.append(replace(fitting, label=CHOSEN if desirable else REJECTED))
                counts[DESIRABLE if desirable else UNDESIRABLE] += 1
                documents += self.fit_unrelated(other, fitting.tokens.size, counts)
        return documents

    def fit_unrelated(
        self, document: Document, answer_tokens: int, counts: Counter[str]
    ) -> list[Document]:
        """The unrelated answer, cut where the rated one leaves no room; none if it is lost."""
        fitting = truncate(document, self.sequence_length - answer_tokens)
        if fitting.target_runs.size:
            return [replace(fitting, label=UNRELATED)]
        counts[NO_ROOM] += 1
        return []


def with_last_answer_only(conversation: Conversation) -> Conversation:
    """The conversation with only the turns after the last user turn trained."""
    return _untrained(conversation, prompt_length(conversation.messages))


def with_answer_of(conversation: Conversation, other: Conversation) -> Conversation:
    """The prompt of one conversation with the answer of another."""
    prompt = conversation.messages[: prompt_length(conversation.messages)]
    answer = other.messages[prompt_length(other.messages) :]
    return replace(conversation, messages=[*prompt, *answer])


def share_sequence(lengths: list[int], limit: int) -> list[int]:
    """Tokens that each document keeps so that all fit in `limit`; the longest are cut first."""
    limits, left = list(lengths), limit
    for position, index in enumerate(np.argsort(lengths, kind="stable").tolist()):
        limits[index] = min(lengths[index], left // (len(lengths) - position))
        left -= limits[index]
    return limits


def _untrained(conversation: Conversation, count: int) -> Conversation:
    """The conversation with its first `count` turns marked as not trained."""
    messages = [
        {**message, "train": False} if index < count and message["role"] == "assistant" else message
        for index, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=messages)
