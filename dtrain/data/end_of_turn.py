"""What a chat template writes to end a turn, as a token or as a text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from dtrain.data.chat_templates import RENDER_SECONDS, ChatTemplate, LimitExceeded, resource_limits
from dtrain.data.conversations import Conversation, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE, ANSWER = "\U000f0000", "\U000f0001"  # private use characters, none of `template_fields`


@dataclass(frozen=True)
class StopCriterion:
    """What ends an answer: a token, a text, or neither if the template does not end turns.

    Attributes:
        token: id of a special token.
        text: for a template that ends turns with ordinary tokens.
    """

    token: int | None = None
    text: str | None = None

    @property
    def texts(self) -> list[str]:
        """The stop strings: none or one."""
        return [self.text] if self.text else []


def find_stop_criterion(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> StopCriterion:
    """How a template ends a turn, with the tokens of a tokenizer."""
    try:
        with resource_limits(RENDER_SECONDS):
            ending = end_of_turn(template)
    except (Exception, LimitExceeded):  # the template refuses a plain exchange
        return StopCriterion()
    if not ending:
        return StopCriterion()
    known = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ids = tokenizer(ending, add_special_tokens=False).input_ids
    # Some tokenizers have added tokens for blanks, which also occur in answers.
    token = next((i for i in ids if i in known and str(tokenizer.decode([i])).strip()), None)
    return StopCriterion(token=token) if token is not None else StopCriterion(text=ending)


def end_of_turn(template: ChatTemplate) -> str:
    """What the template writes after an answer, without trailing blanks; may be empty."""
    inner, last = endings(template) or ("", "")
    return inner if inner and (last.startswith(inner) or not last) else last


@lru_cache(maxsize=8)
def endings(template: ChatTemplate) -> tuple[str, str] | None:
    """What ends an answer in the middle of a conversation, and what ends the last answer.

    Returns:
        None if the template refuses a plain exchange, so that it is unknown.
    """
    first = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": f"a{ANSWER}"}]
    text = _probed(template, first)
    more = _probed(template, [*first, {"role": "user", "content": PROBE}])
    if not text and not more:
        return None
    last = text.partition(ANSWER)[2].rstrip()
    before, middle = more.partition(PROBE)[0], more.partition(ANSWER)[2].partition(PROBE)[0]
    if text and middle.startswith(last):
        return last, last
    # Phi 3 ends the conversation with one more token: the end of a turn is then the text between
    # an answer and the header of the next question.
    same = common_prefix_length(before[::-1], middle[::-1])
    if inner := middle[: len(middle) - same].rstrip():
        return inner, last
    # gpt-oss ends its own preface in the same way, so this text is also before the first question;
    # but a conversation starts like every turn.
    begin = text.removeprefix(dict(template.specials).get("bos_token", ""))
    both = middle[: common_prefix_length(middle, text.partition(PROBE)[2])]
    sizes = range(len(both), 0, -1)
    head = next((size for size in sizes if begin.startswith(both[-size:])), 0)
    return both[: len(both) - head].rstrip(), last


def _probed(template: ChatTemplate, messages: Messages) -> str:
    try:
        return template.render(Conversation(messages))
    except Exception:  # for example, it accepts only one exchange
        return ""


def common_prefix_length(a: str, b: str) -> int:
    """Number of characters that both texts start with."""
    size = 0
    while size < min(len(a), len(b)) and a[size] == b[size]:
        size += 1
    return size
