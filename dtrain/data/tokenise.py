"""Texts and conversations into token ids and runs of supervised tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.data.answers import render_answers
from dtrain.data.conversations import Talk
from dtrain.data.formats import Record
from dtrain.data.sources import Part
from dtrain.data.templates import Span, Template

Int32s = NDArray[np.int32]

EMPTY, CUT, TOO_LONG, MASKED = "empty", "cut", "too_long", "masked"  # counts of documents
UNLEARNABLE = "unlearnable_rows"  # rows of one token


@dataclass(frozen=True)
class Document:
    """One document as tokens.

    Attributes:
        tokens: [n].
        runs: [2 k], (start, stop) of each run of supervised tokens; token 0 is in none of them.
        part, number: where it comes from.
    """

    tokens: Int32s
    runs: Int32s
    part: int
    number: int


@dataclass(frozen=True)
class Tokeniser:
    """What turns the records of a source into documents.

    Attributes:
        template: of conversations; None for texts.
        answers_only: supervise answers (sft), or every token (cpt).
        sequence_tokens, overlong: limit for conversations of an sft stage, and what to do beyond.
        train_on: which answers are supervised: all, or last.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    answers_only: bool
    sequence_tokens: int
    overlong: str
    parts: list[Part]
    train_on: str = "all"

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        """Tokenise a batch; what is left out or cut is counted in `counts`.

        Raises:
            UserError: a row cannot be rendered, or is too long under `overlong: fail`.
        """
        if self.answers_only:
            return self._answers(records, counts)
        texts = [self._text(record) for record in records]
        kept = [i for i, text in enumerate(texts) if text]
        counts[EMPTY] += len(texts) - len(kept)
        if not kept:
            return []
        written = self.template is not None  # a template has written the special tokens
        chosen = [texts[i] for i in kept]
        ids = self.tokenizer(chosen, add_special_tokens=not written, **_QUIET).input_ids
        return [self._whole(tokens, records[i]) for i, tokens in zip(kept, ids, strict=True)]

    def _text(self, record: Record) -> str:
        if isinstance(record.value, str):
            return record.value
        where = self.parts[record.part].place(record.number)
        return self._rendered(record, where, "last")[0]  # finding one answer is less work

    def _rendered(self, record: Record, place: str, train_on: str) -> tuple[str, list[Span]]:
        assert self.template is not None and isinstance(record.value, Talk)
        return render_answers(self.template, record.value, place, train_on)

    def _whole(self, ids: list[int], record: Record) -> Document:
        eos = self.tokenizer.eos_token_id
        tokens = np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)
        runs = np.array([1, tokens.size], dtype=np.int32)
        return Document(tokens, runs, record.part, record.number)

    def _answers(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        places = [self.parts[r.part].place(r.number) for r in records]
        rendered = [
            self._rendered(record, place, self.train_on)
            for record, place in zip(records, places, strict=True)
        ]
        # The template has written the special tokens.
        encoded = self.tokenizer([text for text, _ in rendered], add_special_tokens=False, **_QUIET)
        documents = []
        for index, record in enumerate(records):
            runs = supervised_runs(encoded.encodings[index], *rendered[index])
            tokens = np.array(encoded.input_ids[index], dtype=np.int32)
            document = Document(tokens, runs, record.part, record.number)
            if fitting := self._fit(document, places[index], counts):
                documents.append(fitting)
        return documents

    def _fit(self, document: Document, place: str, counts: Counter[str]) -> Document | None:
        limit = self.sequence_tokens
        if document.tokens.size > limit:
            if self.overlong == "fail":
                raise _too_long(document.tokens.size, limit, place)
            counts[CUT if self.overlong == "truncate" else TOO_LONG] += 1
            if self.overlong == "drop":
                return None
            pairs = np.minimum(document.runs, limit).reshape(-1, 2)
            runs = pairs[pairs[:, 0] < pairs[:, 1]].reshape(-1)
            document = replace(document, tokens=document.tokens[:limit], runs=runs)
        if not document.runs.size:
            counts[MASKED] += 1
            return None
        return document


_QUIET = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


def _too_long(tokens: int, limit: int, place: str) -> UserError:
    return UserError(
        f"the conversation has {tokens} tokens, a sequence holds {limit}",
        where=place,
        fix="raise `sequence_tokens`, or write `overlong: truncate` or `overlong: drop`",
    )


def supervised_runs(encoding: Encoding, text: str, spans: list[Span]) -> Int32s:
    """Runs of the tokens that hold at least one character of an answer.

    Args:
        encoding: of the text.
        spans: characters of the answers, one after the other.

    Returns:
        int32 [2 k]: start and stop of each run; token 0 cannot be predicted and is in none.
    """
    edges: list[int] = []
    for start, stop in spans:
        found = _edges(encoding, text, start, stop)
        if found is None:
            return _runs_of_offsets(encoding.offsets, spans)
        first, end = max(found[0], 1), found[1]
        if edges and first <= edges[-1]:  # a token that holds characters of two answers
            edges[-1] = max(end, edges[-1])
        elif first < end:
            edges += first, end
    return np.array(edges, dtype=np.int32)


def _edges(encoding: Encoding, text: str, start: int, stop: int) -> tuple[int, int] | None:
    """First token of a span and the one behind its last; None where that takes all offsets."""
    if start >= stop:
        return None
    first = encoding.char_to_token(start)
    end = len(encoding) if stop == len(text) else encoding.char_to_token(stop)
    if first is None or end is None or not first < end:
        return None
    opens, last, behind = (
        encoding.token_to_chars(first),
        encoding.token_to_chars(end - 1),
        encoding.token_to_chars(end) if end < len(encoding) else (stop, stop),
    )
    # Tokens may share a character, hold none, or stand across the edge.
    simple = opens and last and behind and last[0] < stop <= behind[0] and opens[1] > start
    return (first, end) if simple else None


def _runs_of_offsets(offsets: list[Span], spans: list[Span]) -> Int32s:
    if not offsets or not spans:
        return np.empty(0, dtype=np.int32)
    edges = np.array(offsets, dtype=np.int64)
    mask = np.zeros(len(offsets) + 2, dtype=bool)  # a false on either side ends every run
    for start, stop in spans:
        mask[1:-1] |= (edges[:, 0] < stop) & (edges[:, 1] > start)
    mask[1] = False
    return np.flatnonzero(mask[1:] != mask[:-1]).astype(np.int32)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Refuse a tokenizer that cannot tell characters from tokens, or (cpt) cannot end a text.

    Raises:
        UserError: naming what it lacks.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer cannot tell which characters a token holds",
            where=type(tokenizer).__name__,
            fix="use a model that has a tokenizer.json",
        )
    if kind == "cpt" and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token",
            where=type(tokenizer).__name__,
            fix="set `eos_token` in the model's tokenizer_config.json",
        )
