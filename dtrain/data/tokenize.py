"""Tokenize texts and conversations into documents: token ids and runs of target tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.data.assistant_spans import NO_END, NO_REASONING, render_answers
from dtrain.data.chat_templates import ChatTemplate, Span
from dtrain.data.conversations import Conversation
from dtrain.data.loss_mask import QUIET, TokenByteLengths, target_runs
from dtrain.data.preferences import OTHER_PROMPTS, SAME_ANSWERS
from dtrain.data.records import Record
from dtrain.data.rendered_conversation import AS_ROLE, UNREAD
from dtrain.data.sources import SourceFile
from dtrain.data.special_tokens import SpecialTokens

COLUMN = "column "  # then its name

Int32s = NDArray[np.int32]

# Counts of documents (of sequences: NO_TARGETS), as keys of a store's manifest.
EMPTY, TRUNCATED, TOO_LONG, MASKED = "empty", "truncated", "too_long", "masked"
NO_TARGETS, SPECIAL = "no_targets", "special_tokens"
NO_ROOM, DESIRABLE, UNDESIRABLE = "no_room", "desirable", "undesirable"  # of rated answers

NOTES = {
    TRUNCATED: "truncated to a sequence",
    TOO_LONG: "left out, longer than a sequence",
    MASKED: "left out, no answer in them",
    EMPTY: "left out, empty",
    SAME_ANSWERS: "pairs left out, the chosen answer is the rejected one",
    OTHER_PROMPTS: "pairs left out, their answers are to different prompts",
    NO_ROOM: "rated answers without an unrelated one next to them, which did not fit",
    NO_TARGETS: "sequences of a single token left out",
    SPECIAL: "with special tokens in their text, encoded as plain text",
    NO_REASONING: "earlier answers without their reasoning: the chat template leaves it out",
    NO_END: "answers after which nothing that ends a turn is learned: the model will not learn to "
    "stop",
}


def count_unread_columns(records: Iterable[Record], counts: Counter[str]) -> None:
    """Count the rows that have a column which their format does not read, by column."""
    for record in records:
        counts.update(f"{COLUMN}`{name}` is not read" for name in record.unread)


def notes(counts: Mapping[str, int]) -> list[str]:
    """Describe what was truncated, left out or changed when rows were read."""
    known = [f"{counts[key]:,} {note}" for key, note in NOTES.items() if counts.get(key)]
    renamed = sorted(key for key in counts if key.startswith((AS_ROLE, UNREAD, COLUMN)))
    return [*known, *(f"{key} in {counts[key]:,} rows" for key in renamed)]


@dataclass(frozen=True)
class Document:
    """A tokenized text, conversation, or answer of a pair.

    Attributes:
        tokens: [n].
        target_runs: [2 k], (start, stop) of each run of targets; token 0 is in none of them.
        file_index, row_number: where it comes from. The documents of one row are an example, which
            packing keeps together (`Packing.WHOLE`).
        label: for the objective, such as 1 for a chosen and 0 for a rejected answer.
    """

    tokens: Int32s
    target_runs: Int32s
    file_index: int
    row_number: int
    label: int = 0


@dataclass(frozen=True)
class RowEncoder(ABC):
    """Turns the rows of a source into documents.

    Attributes:
        template: of conversations; None for texts.
        sequence_length, overlong: the longest document that is not cut, and what happens to a
            longer one.
        train_on: which turns of a conversation are targets, where not every token is.
        split_special_tokens: encode special tokens in the text of rows as plain text.
        settings: keys of the recipe's `data` group that change the documents of this encoder only.
        needs_end_token: whether the tokenizer must have an end-of-text token.
        documents_per_row: more than 1 needs a model that can be packed.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    sequence_length: int
    overlong: str
    source_files: list[SourceFile]
    train_on: str = "all"
    split_special_tokens: bool = True

    settings: ClassVar[tuple[str, ...]] = ()
    needs_end_token: ClassVar[bool] = False
    documents_per_row: ClassVar[int] = 1

    @abstractmethod
    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        """Tokenize a batch of rows; count what is left out or truncated in `counts`.

        Raises:
            UserError: a row cannot be rendered, or is too long under `overlong: fail`.
        """

    def warm_up(self) -> None:
        """Compute what every process would otherwise compute for itself."""
        return

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The tokenizer's special tokens, and how they are kept out of the text of rows."""
        return SpecialTokens(self.tokenizer)

    def location(self, record: Record) -> str:
        """File and line of a row."""
        return self.source_files[record.file_index].location(record.row_number)

    def render(self, record: Record, train_on: str, counts: Counter[str]) -> tuple[str, list[Span]]:
        """Text of a conversation, and the spans of its answers."""
        assert self.template is not None and isinstance(record.value, Conversation)
        return render_answers(self.template, record.value, self.location(record), train_on, counts)

    def hide_special_tokens(
        self, record: Record, text: str, train_on: str, counts: Counter[str]
    ) -> tuple[str, list[Span]] | None:
        """Text and answer spans to encode instead, if the row's text has special tokens."""
        if not (self.split_special_tokens and self.special_tokens.find(record.value)):
            return None
        counts[SPECIAL] += 1
        hidden = self.special_tokens.hidden(record.value)
        spans: list[Span] = []
        if isinstance(hidden, Conversation):
            # the row is counted already
            hidden, spans = self.render(replace(record, value=hidden), train_on, Counter())
        return self.special_tokens.template_hidden(text, hidden, self.location(record)), spans


class FullTextEncoder(RowEncoder):
    """Every token of a text, or of a rendered conversation, is a target."""

    needs_end_token = True

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        texts = [self._text(record, counts) for record in records]
        kept = [index for index, text in enumerate(texts) if text]
        counts[EMPTY] += len(texts) - len(kept)
        if not kept:
            return []
        adds_special = self.template is None  # a template writes them itself
        batch = [texts[index] for index in kept]
        ids = self.tokenizer(batch, add_special_tokens=adds_special, **QUIET).input_ids
        for position, index in enumerate(kept):
            if plain := self.hide_special_tokens(records[index], texts[index], "", counts):
                where = self.location(records[index])
                ids[position], _ = self.special_tokens.encode(
                    plain[0], where, add_special_tokens=adds_special
                )
        return [self._document(tokens, records[i]) for i, tokens in zip(kept, ids, strict=True)]

    def _text(self, record: Record, counts: Counter[str]) -> str:
        if isinstance(record.value, str):
            return record.value
        return self.render(record, "", counts)[0]  # tokens of every role are targets

    def _document(self, ids: list[int], record: Record) -> Document:
        eos = self.tokenizer.eos_token_id
        tokens = np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)
        runs = np.array([1, tokens.size], dtype=np.int32)
        return Document(tokens, runs, record.file_index, record.row_number)


class AnswerEncoder(RowEncoder):
    """The tokens of answers in a rendered conversation are targets."""

    settings = ("overlong", "train_on")

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        encoded = zip(self.encode(records, counts), records, strict=True)
        fitting = [self.fit(document, self.location(row), counts) for document, row in encoded]
        return [document for document in fitting if document]

    def encode(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        """Tokenize conversations of any length, one document each."""
        rendered = [self.render(record, self.train_on, counts) for record in records]
        texts, spans = [text for text, _ in rendered], [answers for _, answers in rendered]
        documents = []
        for index, (tokens, runs) in enumerate(self._encode(texts, spans)):
            record, where = records[index], self.location(records[index])
            if plain := self.hide_special_tokens(record, texts[index], self.train_on, counts):
                ids, encoding = self.special_tokens.encode(
                    plain[0], where, add_special_tokens=False
                )
                runs = target_runs(encoding, *plain)
                tokens = np.array(ids, dtype=np.int32)
            documents.append(Document(tokens, runs, record.file_index, record.row_number))
        return documents

    def _encode(self, texts: list[str], spans: list[list[Span]]) -> list[tuple[Int32s, Int32s]]:
        """Tokens and target runs of each text; the template has written the special tokens."""
        lengths = self.byte_lengths
        fast = lengths.encode(texts, spans) if lengths else repeat(None, len(texts))
        encoded = dict(enumerate(fast))
        if left := [index for index, result in encoded.items() if result is None]:
            batch = self.tokenizer([texts[i] for i in left], add_special_tokens=False, **QUIET)
            for index, encoding in zip(left, batch.encodings, strict=True):
                runs = target_runs(encoding, texts[index], spans[index])
                encoded[index] = np.array(encoding.ids, dtype=np.int32), runs
        return [result for result in encoded.values() if result]

    def warm_up(self) -> None:
        _ = self.byte_lengths

    @cached_property
    def byte_lengths(self) -> TokenByteLengths | None:
        """Bytes of each token, if they determine where tokens start and end."""
        return TokenByteLengths.of(self.tokenizer)

    def fit(self, document: Document, where: str, counts: Counter[str]) -> Document | None:
        """Truncate or leave out a document that is too long, or has no target."""
        limit = self.sequence_length
        if document.tokens.size > limit:
            if self.overlong == "fail":
                raise overlong_error(document.tokens.size, limit, where)
            counts[TRUNCATED if self.overlong == "truncate" else TOO_LONG] += 1
            if self.overlong == "drop":
                return None
            document = truncate(document, limit)
        if not document.target_runs.size:
            counts[MASKED] += 1
            return None
        return document


def truncate(document: Document, limit: int) -> Document:
    """The document without its tokens beyond `limit`."""
    pairs = np.minimum(document.target_runs, limit).reshape(-1, 2)
    runs = pairs[pairs[:, 0] < pairs[:, 1]].reshape(-1)
    return replace(document, tokens=document.tokens[:limit], target_runs=runs)


def overlong_error(tokens: int, limit: int, where: str) -> UserError:
    return UserError(
        f"the conversation has {tokens} tokens, a sequence holds {limit}",
        where=where,
        fix="raise `sequence_length`, or write `overlong: truncate` or `overlong: drop`",
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, needs_end_token: bool) -> None:
    """Check that a tokenizer maps tokens to characters and, where needed, can end a text.

    Raises:
        UserError: naming what it lacks.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer does not map tokens to characters",
            where=type(tokenizer).__name__,
            fix="use a model that has a tokenizer.json",
        )
    if needs_end_token and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token",
            where=type(tokenizer).__name__,
            fix="set `eos_token` in the model's tokenizer_config.json",
        )
