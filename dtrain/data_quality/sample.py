"""What the checks look at in a row: its question and its answer."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.data.conversations import Conversation, Preference
from dtrain.data.formats import RowContent


@dataclass(frozen=True)
class Sample:
    """A row as the checks see it.

    Attributes:
        question: what is asked, all turns of it; empty where `is_text`.
        answer: what is to be learnt, all turns of it; the whole text where `is_text`.
        is_text: the row is a plain text without a question.
    """

    question: str
    answer: str
    is_text: bool = False

    @property
    def whole(self) -> str:
        """All of its text."""
        return self.answer if self.is_text else f"{self.question}\n{self.answer}"


def sample_of(value: RowContent) -> Sample:
    """The sample of a row; of a pair, the wanted side, or the only one."""
    if isinstance(value, str):
        return Sample("", value, is_text=True)
    talk = value
    if isinstance(value, Preference):
        talk = value.chosen or value.rejected or Conversation([])
    assert isinstance(talk, Conversation)
    answers = [_said(m) for m in talk.messages if m["role"] == "assistant"]
    questions = [m["content"] for m in talk.messages if m["role"] != "assistant"]
    return Sample("\n".join(questions), "\n".join(answers))


def _said(message: dict[str, object]) -> str:
    """An answer's text; with its reasoning, and its calls of tools."""
    reasoning = message.get("reasoning_content")
    calls = message.get("tool_calls")
    return f"{reasoning}\n" * bool(reasoning) + f"{message['content']}{calls or ''}"
