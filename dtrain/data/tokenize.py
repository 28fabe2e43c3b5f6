"""Texts and conversations into token ids and runs of supervised tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
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
from dtrain.data.records import Record
from dtrain.data.rendered_conversation import AS_ROLE, UNREAD
from dtrain.data.sources import SourceFile
from dtrain.data.special_tokens import SpecialTokens

Int32s = NDArray[np.int32]

EMPTY, CUT, TOO_LONG, MASKED = (
    "empty",
    "cut",
    "too_long",
    "masked",
)  # counts of documents
UNLEARNABLE = "unlearnable_rows"  # rows of one token
SPECIAL = "special_tokens"  # documents whose text holds some


NOTES = {
    CUT: "cut at the end of a sequence",
    TOO_LONG: "left out, longer than a sequence",
    MASKED: "left out, no answer in them",
    EMPTY: "left out, empty",
    UNLEARNABLE: "rows of a single token left out",
    SPECIAL: "with special tokens in their text, encoded as plain text",
    NO_REASONING: "earlier answers without their reasoning: the chat template leaves it out",
    NO_END: "answers after which nothing that ends a turn is learned: the model will not learn to "
    "stop",
}


def notes(counts: Mapping[str, int]) -> list[str]:
    """What was cut, left out or read in another way, for a person."""
    known = [f"{counts[key]:,} {note}" for key, note in NOTES.items() if counts.get(key)]
    renamed = sorted(key for key in counts if key.startswith((AS_ROLE, UNREAD)))
    return [*known, *(f"{key} in {counts[key]:,} rows" for key in renamed)]


@dataclass(frozen=True)
class Document:
    """One document as tokens.

    Attributes:
        tokens: [n].
        runs: [2 k], (start, stop) of each run of supervised tokens; token 0 is in none of them.
        part, number: where it comes from. The documents of one row are an example, which packing
            keeps together (`Packing.WHOLE`).
        label: what the objective makes of it, such as 1 for a chosen and 0 for a rejected answer.
    """

    tokens: Int32s
    runs: Int32s
    part: int
    number: int
    label: int = 0


@dataclass(frozen=True)
class RowEncoder(ABC):
    """Turns the rows of a source into documents.

    Attributes:
        template: of conversations; None for texts.
        sequence_length, overlong: limit for documents that are not cut, and what to do beyond.
        train_on: which turns of a conversation are supervised, where not every token is.
        split_special_tokens: encode special tokens in the text of rows as plain text.
        settings: keys of the recipe's `data` group that shape these documents and no others.
        needs_end_token: whether the tokenizer must have an end-of-text token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    sequence_length: int
    overlong: str
    parts: list[SourceFile]
    train_on: str = "all"
    split_special_tokens: bool = True

    settings: ClassVar[tuple[str, ...]] = ()
    needs_end_token: ClassVar[bool] = False

    @abstractmethod
    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        """Tokenize a batch; what is left out or cut is counted in `counts`.

        Raises:
            UserError: a row cannot be rendered, or is too long under `overlong: fail`.
        """

    def warm_up(self) -> None:
        """Compute what several processes would otherwise compute each."""
        return

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        """The tokenizer's special tokens, and how they are kept out of the text of rows."""
        return SpecialTokens(self.tokenizer)

    def _place(self, record: Record) -> str:
        return self.parts[record.file_index].location(record.row_number)

    def _rendered(
        self, record: Record, train_on: str, counts: Counter[str]
    ) -> tuple[str, list[Span]]:
        assert self.template is not None and isinstance(record.value, Conversation)
        return render_answers(self.template, record.value, self._place(record), train_on, counts)

    def _plain(
        self, record: Record, text: str, train_on: str, counts: Counter[str]
    ) -> tuple[str, list[Span]] | None:
        """What is encoded instead of a text, and its answers, if the row holds special tokens."""
        if not (self.split_special_tokens and self.special_tokens.find(record.value)):
            return None
        counts[SPECIAL] += 1
        place, hidden = self._place(record), self.special_tokens.hidden(record.value)
        spans: list[Span] = []
        if isinstance(hidden, Conversation):
            own = replace(record, value=hidden)
            hidden, spans = self._rendered(own, train_on, Counter())  # counted already
        return self.special_tokens.template_hidden(text, hidden, place), spans


class FullTextEncoder(RowEncoder):
    """Every token of a text, or of a rendered conversation, is a target."""

    needs_end_token = True

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        texts = [self._text(record, counts) for record in records]
        kept = [i for i, text in enumerate(texts) if text]
        counts[EMPTY] += len(texts) - len(kept)
        if not kept:
            return []
        written = self.template is not None  # a template has written the special tokens
        chosen = [texts[i] for i in kept]
        ids = self.tokenizer(chosen, add_special_tokens=not written, **QUIET).input_ids
        for place, index in enumerate(kept):
            if plain := self._plain(records[index], texts[index], "", counts):
                where = self._place(records[index])
                ids[place], _ = self.special_tokens.encode(
                    plain[0], where, add_special_tokens=not written
                )
        return [self._whole(tokens, records[i]) for i, tokens in zip(kept, ids, strict=True)]

    def _text(self, record: Record, counts: Counter[str]) -> str:
        if isinstance(record.value, str):
            return record.value
        return self._rendered(record, "", counts)[0]  # every token is learned, of every role

    def _whole(self, ids: list[int], record: Record) -> Document:
        eos = self.tokenizer.eos_token_id
        tokens = np.array(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)
        runs = np.array([1, tokens.size], dtype=np.int32)
        return Document(tokens, runs, record.file_index, record.row_number)


class AnswerEncoder(RowEncoder):
    """The tokens of answers in a rendered conversation are targets."""

    settings = ("overlong", "train_on")

    def documents(self, records: list[Record], counts: Counter[str]) -> list[Document]:
        places = [self.parts[r.file_index].location(r.row_number) for r in records]
        rendered = [self._rendered(record, self.train_on, counts) for record in records]
        texts, spans = [text for text, _ in rendered], [own for _, own in rendered]
        documents = []
        for index, (tokens, runs) in enumerate(self._encoded(texts, spans)):
            record = records[index]
            if plain := self._plain(record, texts[index], self.train_on, counts):
                ids, encoding = self.special_tokens.encode(
                    plain[0], places[index], add_special_tokens=False
                )
                runs = target_runs(encoding, *plain)
                tokens = np.array(ids, dtype=np.int32)
            document = Document(tokens, runs, record.file_index, record.row_number)
            if fitting := self._fit(document, places[index], counts):
                documents.append(fitting)
        return documents

    def _encoded(self, texts: list[str], spans: list[list[Span]]) -> list[tuple[Int32s, Int32s]]:
        """Tokens and supervised runs of each text; the template has written the special tokens."""
        quick = self.lengths.encode(texts, spans) if self.lengths else repeat(None, len(texts))
        found = dict(enumerate(quick))
        if left := [index for index, one in found.items() if one is None]:
            own = self.tokenizer([texts[i] for i in left], add_special_tokens=False, **QUIET)
            for index, encoding in zip(left, own.encodings, strict=True):
                runs = target_runs(encoding, texts[index], spans[index])
                found[index] = np.array(encoding.ids, dtype=np.int32), runs
        return [one for one in found.values() if one]

    def warm_up(self) -> None:
        _ = self.lengths

    @cached_property
    def lengths(self) -> TokenByteLengths | None:
        """Where tokens start and end, if their lengths tell it."""
        return TokenByteLengths.of(self.tokenizer)

    def _fit(self, document: Document, place: str, counts: Counter[str]) -> Document | None:
        limit = self.sequence_length
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


def _too_long(tokens: int, limit: int, place: str) -> UserError:
    return UserError(
        f"the conversation has {tokens} tokens, a sequence holds {limit}",
        where=place,
        fix="raise `sequence_length`, or write `overlong: truncate` or `overlong: drop`",
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, needs_end_token: bool) -> None:
    """Check that a tokenizer maps tokens to characters and, where needed, can end a text.

    Raises:
        UserError: naming what it lacks.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "the tokenizer cannot tell which characters a token holds",
            where=type(tokenizer).__name__,
            fix="use a model that has a tokenizer.json",
        )
    if needs_end_token and tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-text token",
            where=type(tokenizer).__name__,
            fix="set `eos_token` in the model's tokenizer_config.json",
        )
