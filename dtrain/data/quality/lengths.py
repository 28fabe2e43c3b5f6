"""Tokens of rows as a stage would make them, for a scan."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.data.answers import render_answers
from dtrain.data.conversations import Pair, Talk
from dtrain.data.quality.scan import REFUSED
from dtrain.data.rows import Value
from dtrain.data.special_tokens import SpecialTokens
from dtrain.data.templates import Template, resolve_template
from dtrain.data.tokenise import MASKED


class TokenCounter:
    """Renders, checks and tokenises rows, and keeps only how many tokens came out.

    Attributes:
        reasons: of the last batch, why the template refuses a row, by its number.
        counts: of all batches, what `tokenise.notes` puts into words.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        train_on: str = "all",
        split_special_tokens: bool = True,
    ) -> None:
        """Count with the recipe's settings; `train_on` is "" where every token is learned.

        Raises:
            UserError: there is no such template, and a conversation comes (see `__call__`).
        """
        self.tokenizer, self.setting, self.train_on = tokenizer, template, train_on
        self.template: Template | None = None
        self.reasons: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.special_tokens, self.split = SpecialTokens(tokenizer), split_special_tokens

    def __call__(self, values: list[Value]) -> NDArray[np.int32]:
        """Tokens of each row, REFUSED where the template does not take it."""
        self.reasons = {}
        texts = [self._text(number, value) for number, value in enumerate(values)]
        known = [text for text in texts if text is not None]
        special = any(isinstance(value, str) for value in values)
        encoded = self.tokenizer(known, add_special_tokens=special, verbose=False) if known else {}
        lengths = iter([len(ids) for ids in encoded.get("input_ids", [])])
        counts = np.array([REFUSED if t is None else next(lengths) for t in texts], np.int32)
        for number, (value, text) in enumerate(zip(values, texts, strict=True)):
            if self.split and text is not None and self.special_tokens.found(value):
                counts[number] = self._split(number, value, text)
        return counts

    def _split(self, number: int, value: Value, text: str) -> int:
        """Tokens of a row whose special tokens are encoded as plain text."""
        own = (value.wanted or value.unwanted) if isinstance(value, Pair) else value
        hidden = self.special_tokens.hidden(own)
        try:
            if isinstance(hidden, Talk):
                assert self.template is not None
                hidden = render_answers(self.template, hidden, "", self.train_on, Counter())[0]
            plain = self.special_tokens.template_hidden(text, hidden, "")
            adds = isinstance(value, str)
            return len(self.special_tokens.encode(plain, "", add_special_tokens=adds)[0])
        except UserError as error:
            self.reasons[number] = error.what
            return REFUSED

    def _text(self, number: int, value: Value) -> str | None:
        if isinstance(value, str):
            return value
        if self.template is None:
            self.template = resolve_template(self.setting, self.tokenizer)
        sides = (value.wanted, value.unwanted) if isinstance(value, Pair) else (value,)
        texts = []
        for talk in sides:
            if talk is None:
                continue
            try:
                text, spans = render_answers(self.template, talk, "", self.train_on, self.counts)
            except UserError as error:
                self.reasons[number] = error.what
                return None
            self.counts[MASKED] += bool(self.train_on) and not spans
            texts.append(text)
        return texts[0]
