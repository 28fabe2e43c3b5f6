"""Encode special tokens in the text of rows as plain text; only templates write special tokens.

Like `split_special_tokens` of transformers, which works only on whole texts, for the row's texts in
a rendered conversation. The conversation is rendered again with placeholders for the special tokens
in its texts, which shows the ones that the template wrote. A copy of the tokenizer that splits
special tokens then encodes the text, with other placeholders for those of the template.

Placeholders have the length of what they replace, so character offsets do not change.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.data.conversations import Conversation, Preference

# Private use characters of plane 16, which no font or file is known to use.
TEMPLATE_FIRST, ROW_FIRST, FILLER = 0x100000, 0x108000, "\U0010fffd"
PLACEHOLDERS = re.compile("[\U00100000-\U0010ffff]")
TEMPLATE = re.compile(f"[\U00100000-\U00107fff]{FILLER}*")
ROW = re.compile(f"[\U00108000-\U0010fff0]{FILLER}*")
ALLOW = "or set `split_special_tokens: false` to encode such a text as the token"


class SpecialTokens:
    """The special tokens of a tokenizer, and an encoder that makes none from the text of rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {token.content: (n, token) for n, token in added.items() if token.special}
        self._names = sorted(
            filter(None, self._added), key=len, reverse=True
        )  # longest match first
        self._any = re.compile("|".join(map(re.escape, self._names))) if self._names else None

    def find(self, value: object) -> list[str]:
        """The special tokens in the texts of a row, a list or an object, without duplicates."""
        if isinstance(value, Conversation):
            return self.find([value.messages, value.tools])
        if isinstance(value, Preference):
            return self.find([value.chosen, value.rejected])
        if self._any is None:
            return []
        if isinstance(value, str):
            return list(dict.fromkeys([*self._any.findall(value), *self._normalized_in(value)]))
        items = [*value, *value.values()] if isinstance(value, dict) else value
        if not isinstance(items, list):
            return []
        return list(dict.fromkeys(name for item in items for name in self.find(item)))

    def _normalized_in(self, text: str) -> list[str]:
        """The special tokens that a text contains after the tokenizer's normalization."""
        if not self._normalized:
            return []
        normal = self._normalizer.normalize_str(text)
        return [name for name, form in self._normalized.items() if form in normal]

    @property
    def _normalizer(self) -> Any:
        return self.tokenizer.backend_tokenizer.normalizer

    @cached_property
    def _normalized(self) -> dict[str, str]:
        """Special tokens that the tokenizer finds in normalized text → their normalized form."""
        if self._normalizer is None:
            return {}
        names = [name for name in self._names if self._added[name][1].normalized]
        return {name: self._normalizer.normalize_str(name) for name in names}

    def hidden(self, value: Any) -> Any:
        """A text or a conversation with placeholders for the special tokens in its texts."""
        if isinstance(value, Conversation):
            return replace(
                value, messages=self.hidden(value.messages), tools=self.hidden(value.tools)
            )
        if isinstance(value, str):
            return self._with_placeholders(value, ROW_FIRST)
        if isinstance(value, dict):
            return {self.hidden(key): self.hidden(item) for key, item in value.items()}
        return [self.hidden(item) for item in value] if isinstance(value, list) else value

    def template_hidden(self, text: str, rendered: str, where: str) -> str:
        """A text with placeholders for the special tokens that a template wrote.

        Args:
            text: without placeholders.
            rendered: the same text, rendered from a row of `hidden`.
            where: file and line, for the message.

        Raises:
            UserError: the template treats such texts as special tokens.
        """
        hidden = self._restore(self._with_placeholders(rendered, TEMPLATE_FIRST), ROW_FIRST)
        if PLACEHOLDERS.search(text) or self._restore(hidden, TEMPLATE_FIRST) != text:
            message = "the chat template reads the special tokens in the row's text as its own"
            raise UserError(message, where=where, fix=f"remove them from the row, {ALLOW}")
        return hidden

    def encode(
        self, text: str, where: str, *, add_special_tokens: bool
    ) -> tuple[list[int], Encoding]:
        """Token ids of a text, and their offsets in it.

        Args:
            text: from `template_hidden` if it was rendered.
            where: file and line, for the message.
            add_special_tokens: add the tokenizer's special tokens at the start and the end.

        Raises:
            UserError: the tokenizer makes a special token of plain text.
        """
        encoding = self._splitting.encode(text, add_special_tokens=add_special_tokens)
        ids = [self._ids.get(token_id, token_id) for token_id in encoding.ids]
        special = {token_id for token_id, _ in self._added.values()} - {self.tokenizer.unk_token_id}
        of_text = zip(ids, encoding.special_tokens_mask, strict=True)
        actual = [
            token_id for token_id, is_added in of_text if token_id in special and not is_added
        ]
        expected = [
            self._added[self._restore(m, TEMPLATE_FIRST)][0] for m in TEMPLATE.findall(text)
        ]
        if actual != [token_id for token_id in expected if token_id in special]:
            message = (
                "the tokenizer cannot encode the special tokens in the row's text as plain text"
            )
            raise UserError(message, where=where, fix=f"remove them from the row, {ALLOW}")
        return ids, encoding

    @cached_property
    def _splitting(self) -> Tokenizer:
        """A copy of the tokenizer that knows its special tokens only by their placeholders."""
        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        rules = ("single_word", "lstrip", "rstrip", "normalized")
        copy.add_tokens(
            [
                AddedToken(
                    _placeholder(TEMPLATE_FIRST, index, name),
                    special=False,
                    **{rule: getattr(self._added[name][1], rule) for rule in rules},
                )
                for index, name in enumerate(self._names)
            ]
        )
        return copy

    @cached_property
    def _ids(self) -> dict[int | None, int]:
        """Id of a placeholder → id of its special token."""
        return {
            self._splitting.token_to_id(_placeholder(TEMPLATE_FIRST, index, name)): self._added[
                name
            ][0]
            for index, name in enumerate(self._names)
        }

    def _with_placeholders(self, text: str, first: int) -> str:
        assert self._any is not None
        return self._any.sub(lambda m: _placeholder(first, self._names.index(m[0]), m[0]), text)

    def _restore(self, text: str, first: int) -> str:
        pattern = TEMPLATE if first == TEMPLATE_FIRST else ROW
        return pattern.sub(lambda m: self._names[(ord(m[0][0]) - first) % len(self._names)], text)


def _placeholder(first: int, index: int, name: str) -> str:
    return chr(first + index) + FILLER * (len(name) - 1)
