"""The text of a row as quality checks and augmentation read it: its questions and its answers."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.data.conversations import Conversation, Preference
from dtrain.data.formats import RowContent


@dataclass(frozen=True)
class RowText:
    """The question and the answer of a row.

    Attributes:
        question: the messages of all roles but the assistant's, joined; empty if `is_text`.
        answer: the assistant's messages, joined; the whole text if `is_text`.
        is_text: the row is plain text without a question.
    """

    question: str
    answer: str
    is_text: bool = False

    @property
    def full(self) -> str:
        """The question and the answer."""
        return self.answer if self.is_text else f"{self.question}\n{self.answer}"


def row_text(value: RowContent) -> RowText:
    """The text of a row; of a preference, its chosen side, or the only side that it has."""
    if isinstance(value, str):
        return RowText("", value, is_text=True)
    conversation = value
    if isinstance(value, Preference):
        conversation = value.chosen or value.rejected or Conversation([])
    assert isinstance(conversation, Conversation)
    answers = [_answer_text(m) for m in conversation.messages if m["role"] == "assistant"]
    questions = [m["content"] for m in conversation.messages if m["role"] != "assistant"]
    return RowText("\n".join(questions), "\n".join(answers))


def _answer_text(message: dict[str, object]) -> str:
    """An assistant message with its reasoning and its tool calls."""
    reasoning = message.get("reasoning_content")
    tool_calls = message.get("tool_calls")
    return f"{reasoning}\n" * bool(reasoning) + f"{message['content']}{tool_calls or ''}"
