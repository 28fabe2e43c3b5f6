"""Tokens of rows as a stage would make them, for a scan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.data.conversations import Pair, Talk
from dtrain.data.limits import Limit, limits
from dtrain.data.quality.scan import REFUSED
from dtrain.data.rows import Value
from dtrain.data.templates import SECONDS, Template, resolve_template


class TokenCounter:
    """Renders and tokenises rows, and keeps only how many tokens came out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        """Count with the recipe's `template` setting.

        Raises:
            UserError: there is no such template, and a conversation comes (see `__call__`).
        """
        self.tokenizer, self.setting = tokenizer, template
        self.template: Template | None = None

    def __call__(self, values: list[Value]) -> NDArray[np.int32]:
        """Tokens of each row, REFUSED where the template does not take it."""
        texts = [self._text(value) for value in values]
        known = [text for text in texts if text is not None]
        special = any(isinstance(value, str) for value in values)
        encoded = self.tokenizer(known, add_special_tokens=special, verbose=False) if known else {}
        lengths = iter([len(ids) for ids in encoded.get("input_ids", [])])
        return np.array([REFUSED if t is None else next(lengths) for t in texts], np.int32)

    def _text(self, value: Value) -> str | None:
        if isinstance(value, str):
            return value
        if self.template is None:
            self.template = resolve_template(self.setting, self.tokenizer)
        talk = (value.wanted or value.unwanted) if isinstance(value, Pair) else value
        assert isinstance(talk, Talk)
        try:
            with limits(SECONDS):
                return self.template.render(talk)
        except UserError:
            raise
        except (Exception, Limit):  # a template is a program: it can raise anything
            return None
