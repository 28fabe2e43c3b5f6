"""Special tokens in the text of rows: a row says text, and only a template writes tokens.

As `split_special_tokens` of transformers, which knows only whole texts, for what comes from the
row in a rendered conversation: rendered once more with stand-ins for the special tokens in the
row's texts, so that it is known which ones the template wrote; then encoded by a copy of the
tokenizer that splits special tokens, and that has stand-ins for those of the template.

All stand-ins are as long as what they stand for, so places in the text stay what they are.
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

# Characters of plane 16, which is for private use and which no font or file is known to use.
TEMPLATE_FIRST, ROW_FIRST, FILLER = 0x100000, 0x108000, "\U0010fffd"
STAND_INS = re.compile("[\U00100000-\U0010ffff]")
TEMPLATE = re.compile(f"[\U00100000-\U00107fff]{FILLER}*")
ROW = re.compile(f"[\U00108000-\U0010fff0]{FILLER}*")
ALLOW = "or write `split_special_tokens: false`, and such a text becomes the token"


class SpecialTokens:
    """The special tokens of a tokenizer, and encodings in which the text of rows makes none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._added = {one.content: (n, one) for n, one in added.items() if one.special}
        self._names = sorted(
            filter(None, self._added), key=len, reverse=True
        )  # longest match first
        self._any = re.compile("|".join(map(re.escape, self._names))) if self._names else None

    def found(self, value: object) -> list[str]:
        """The special tokens in a row's texts, or in those of lists and objects; each once."""
        if isinstance(value, Conversation):
            return self.found([value.messages, value.tools])
        if isinstance(value, Preference):
            return self.found([value.chosen, value.rejected])
        if self._any is None:
            return []
        if isinstance(value, str):
            return list(dict.fromkeys([*self._any.findall(value), *self._normalized_in(value)]))
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        if not isinstance(inner, list):
            return []
        return list(dict.fromkeys(name for one in inner for name in self.found(one)))

    def _normalized_in(self, text: str) -> list[str]:
        """The special tokens that a text becomes where the tokenizer normalizes it first."""
        if not self._normalized:
            return []
        normal = self._normalizer.normalize_str(text)
        return [name for name, written in self._normalized.items() if written in normal]

    @property
    def _normalizer(self) -> Any:
        return self.tokenizer.backend_tokenizer.normalizer

    @cached_property
    def _normalized(self) -> dict[str, str]:
        """The special tokens that the tokenizer looks for in normalized text, as they are there."""
        if self._normalizer is None:
            return {}
        names = [name for name in self._names if self._added[name][1].normalized]
        return {name: self._normalizer.normalize_str(name) for name in names}

    def hidden(self, value: Any) -> Any:
        """A text or a conversation with stand-ins for the special tokens in its texts."""
        if isinstance(value, Conversation):
            return replace(
                value, messages=self.hidden(value.messages), tools=self.hidden(value.tools)
            )
        if isinstance(value, str):
            return self._with_stand_ins(value, ROW_FIRST)
        if isinstance(value, dict):
            return {self.hidden(key): self.hidden(one) for key, one in value.items()}
        return [self.hidden(one) for one in value] if isinstance(value, list) else value

    def template_hidden(self, text: str, rendered: str, where: str) -> str:
        """A text with stand-ins for the special tokens that a template wrote.

        Args:
            text: as it is without stand-ins.
            rendered: the same, of a row from `hidden`.
            where: file and line, for the message.

        Raises:
            UserError: the template reads such texts, so they are not only text.
        """
        hidden = self._without(self._with_stand_ins(rendered, TEMPLATE_FIRST), ROW_FIRST)
        if STAND_INS.search(text) or self._without(hidden, TEMPLATE_FIRST) != text:
            what = "the chat template reads the special tokens in the row's text as its own"
            raise UserError(what, where=where, fix=f"take them out of the row, {ALLOW}")
        return hidden

    def encode(
        self, text: str, where: str, *, add_special_tokens: bool
    ) -> tuple[list[int], Encoding]:
        """Token ids of a text, and their places in it.

        Args:
            text: in which special tokens are plain text; of `template_hidden` if it was rendered.
            where: file and line, for the message.
            add_special_tokens: as the tokenizer does, at the start and the end.

        Raises:
            UserError: the tokenizer makes a special token of plain text.
        """
        encoding = self._splitting.encode(text, add_special_tokens=add_special_tokens)
        ids = [self._ids.get(number, number) for number in encoding.ids]
        special = {number for number, _ in self._added.values()} - {self.tokenizer.unk_token_id}
        of_text = zip(ids, encoding.special_tokens_mask, strict=True)
        came = [number for number, is_added in of_text if number in special and not is_added]
        written = [self._added[self._without(m, TEMPLATE_FIRST)][0] for m in TEMPLATE.findall(text)]
        if came != [number for number in written if number in special]:
            what = "the tokenizer cannot encode the special tokens in the row's text as plain text"
            raise UserError(what, where=where, fix=f"take them out of the row, {ALLOW}")
        return ids, encoding

    @cached_property
    def _splitting(self) -> Tokenizer:
        """A copy of the tokenizer that knows its special tokens by their stand-ins only."""
        copy = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        rules = ("single_word", "lstrip", "rstrip", "normalized")
        copy.add_tokens(
            [
                AddedToken(
                    _stand_in(TEMPLATE_FIRST, number, name),
                    special=False,
                    **{rule: getattr(self._added[name][1], rule) for rule in rules},
                )
                for number, name in enumerate(self._names)
            ]
        )
        return copy

    @cached_property
    def _ids(self) -> dict[int | None, int]:
        """Ids of the stand-ins → ids of the special tokens."""
        return {
            self._splitting.token_to_id(_stand_in(TEMPLATE_FIRST, number, name)): self._added[name][
                0
            ]
            for number, name in enumerate(self._names)
        }

    def _with_stand_ins(self, text: str, first: int) -> str:
        assert self._any is not None
        return self._any.sub(lambda m: _stand_in(first, self._names.index(m[0]), m[0]), text)

    def _without(self, text: str, first: int) -> str:
        pattern = TEMPLATE if first == TEMPLATE_FIRST else ROW
        return pattern.sub(lambda m: self._names[(ord(m[0][0]) - first) % len(self._names)], text)


def _stand_in(first: int, number: int, name: str) -> str:
    return chr(first + number) + FILLER * (len(name) - 1)
