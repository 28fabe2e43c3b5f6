"""New tokens of a run: their recipe keys."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from dtrain.config.group import Group, Text

INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format, not a character, …


def _check_token(text: str) -> str:
    """Check that a token can be seen and is found in a text as it is written."""
    if text != text.strip():
        raise ValueError("a token neither begins nor ends with a space")
    if odd := [char for char in text if unicodedata.category(char) in INVISIBLE]:
        raise ValueError(f"a token has no control or invisible characters, such as {odd[0]!a}")
    return text


def _check_distinct(tokens: list[str]) -> list[str]:
    if twice := [token for token in tokens if tokens.count(token) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return tokens


Token = Annotated[Text, AfterValidator(_check_token)]
TokenList = Annotated[list[Token], Field(min_length=1), AfterValidator(_check_distinct)]


class Tokens(Group):
    """Tokens that the base does not have."""

    add: TokenList | Annotated[dict[Token, Text], Field(min_length=1)] = Field(
        description=(
            "new tokens, such as `[<tool>]`; each starts at the mean of all the base's tokens. Or "
            "`{<tool>: tool call}`: at the mean of these words' tokens"
        )
    )

    @field_validator("add")
    @classmethod
    def _check_words(cls, add: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        """Check that the words of each token are words that the base can know."""
        words_of = add if isinstance(add, dict) else {}
        for token, words in words_of.items():
            if not words.strip():
                raise ValueError(f"{token!r} has no words to start from")
            for other, its_words in words_of.items():
                alone = rf"(?<!\w){re.escape(other)}(?!\w)"
                if other not in (token, its_words) and re.search(alone, words):
                    raise ValueError(
                        f"{token!r} cannot start from {other!r}, which is new too; write "
                        f"the words that it starts from, {its_words!r}"
                    )
        return add

    @property
    def words(self) -> dict[str, str | None]:
        """Token → the words that it starts from; None for all tokens."""
        return dict(self.add) if isinstance(self.add, dict) else dict.fromkeys(self.add)
