"""Where a model stops: the token, or the string, that closed its turns in training."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dtrain.data.answers import end_of_turn
from dtrain.data.limits import Limit, limits
from dtrain.data.templates import SECONDS, Template


@dataclass(frozen=True)
class Stop:
    """What ends an answer; neither, if the template closes no turn.

    Attributes:
        token: id of a token that stands for nothing else.
        text: for a template that closes a turn with ordinary tokens.
    """

    token: int | None = None
    text: str | None = None

    @property
    def texts(self) -> list[str]:
        """The stop strings, none or one."""
        return [self.text] if self.text else []


def stop_of(template: Template, tokenizer: PreTrainedTokenizerBase) -> Stop:
    """What closes a turn under a template, as a tokenizer reads it."""
    try:
        with limits(SECONDS):
            ending = end_of_turn(template)
    except (Exception, Limit):  # a template is a program; this one refuses a plain exchange
        return Stop()
    if not ending:
        return Stop()
    known = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ids = tokenizer(ending, add_special_tokens=False).input_ids
    # Some tokenizers add runs of blanks as tokens, which stand inside answers too.
    token = next((i for i in ids if i in known and str(tokenizer.decode([i])).strip()), None)
    return Stop(token=token) if token is not None else Stop(text=ending)
