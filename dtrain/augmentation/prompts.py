"""The prompt for a row, and the row that a reply makes of it.

rewrite         the instruction in other words; everything after it stays: an answer, tool calls
                with their results, or both answers of a preference
answers         another answer to the same conversation
backtranslate   the instruction that a text answers (Li et al., arXiv:2308.06259)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from dtrain.data.conversations import Conversation, Messages, Preference
from dtrain.data.duplicates import text_key
from dtrain.data.formats import RowContent

Mode = Literal["rewrite", "answers", "backtranslate"]

REWRITE = """\
Say the instruction between the tags in other words. It must ask for exactly the same, in the same \
language, with every name, number and condition in it. Do not carry it out. Reply with the new \
instruction alone.

<instruction>
{text}
</instruction>"""
BACKTRANSLATE = """\
Write the instruction to which the text between the tags is the best answer, as a person would ask \
for it, in the language of the text. Do not quote the text. Reply with the instruction alone.

<text>
{text}
</text>"""

_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_TAGS = re.compile(r"^<(instruction|text)>\s*(.*?)\s*</\1>$", re.DOTALL)
_NO_ANSWER = "does not end with an answer to a user"


@dataclass(frozen=True)
class SourceRow:
    """A row of the source.

    Attributes:
        index: of the row among all readable rows of the source.
        location: file and line.
    """

    index: int
    location: str
    value: RowContent


def build_prompt(value: RowContent, mode: Mode) -> Messages | None:
    """The request for a row; None if `unsupported_reason` has a reason."""
    if unsupported_reason(value, mode):
        return None
    if mode == "rewrite":
        return [_user_message(REWRITE.format(text=_instruction(value)))]
    if mode == "backtranslate":
        text = value if isinstance(value, str) else _last_message(value)
        return [_user_message(BACKTRANSLATE.format(text=text))]
    messages = _conversations(value)[0].messages[:-1]
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def unsupported_reason(value: RowContent, mode: Mode) -> str:
    """Why a mode cannot use a row; empty if it can.

    A reply is one text. It can replace the instruction of any row, but it contains no tool calls,
    and it does not say which of two new answers is the better one.
    """
    if isinstance(value, str):
        return "" if mode == "backtranslate" and value.strip() else "a text without an instruction"
    answered = all(c.messages[-1]["role"] == "assistant" for c in _conversations(value))
    if not answered or _question_index(value) is None:
        return _NO_ANSWER
    if mode == "rewrite":
        return ""
    if isinstance(value, Preference):
        return "a preference between answers"
    if value.tools or any(m.get("tool_calls") or m["role"] == "tool" for m in value.messages):
        return "with tools"
    if value.messages[-2]["role"] != "user":
        return _NO_ANSWER
    return "" if mode == "answers" or _last_message(value).strip() else "an empty answer"


def apply_reply(value: RowContent, mode: Mode, reply: str) -> RowContent:
    """The new row that a reply to `build_prompt` makes of a row."""
    text = clean_reply(reply, mode)
    if isinstance(value, str):
        return Conversation([_user_message(text), {"role": "assistant", "content": value}])
    index = _question_index(value)
    if isinstance(value, Preference):
        sides = (value.chosen, value.rejected)
        return Preference(*(side and _replace_instruction(side, index, text) for side in sides))
    if mode == "answers":
        *earlier, answer = value.messages
        return replace(value, messages=[*earlier, {**answer, "content": text}])
    return _replace_instruction(value, index, text)


def clean_reply(reply: str, mode: Mode) -> str:
    """A reply without its reasoning, and without the tags that some models repeat."""
    text = _THINKING.sub("", reply).strip()
    match = None if mode == "answers" else _TAGS.match(text)
    return match.group(2) if match else text


def comparison_text(row: SourceRow, mode: Mode) -> tuple[int, str] | None:
    """The text of a row that new rows must not repeat, and the key of its comparison group.

    Questions are compared with questions that have the same alpaca input, answers with answers to
    the same row. None if the row has no such text.
    """
    if unsupported_reason(row.value, "rewrite"):
        return None
    if mode == "answers":
        if unsupported_reason(row.value, mode):
            return None
        return text_key(f"row {row.index}"), _last_message(row.value)
    return text_key(str(_question(row.value).get("input") or "")), _instruction(row.value)


def _conversations(value: RowContent) -> list[Conversation]:
    """The conversations of a row: both sides of a preference."""
    if isinstance(value, Preference):
        return [side for side in (value.chosen, value.rejected) if side]
    return [value] if isinstance(value, Conversation) else []


def _question_index(value: RowContent) -> int | None:
    """Index of the last user message that all sides of a row share."""
    sides = [conversation.messages for conversation in _conversations(value)]
    shared = 0
    while all(len(m) > shared for m in sides) and all(m[shared] == sides[0][shared] for m in sides):
        shared += 1
    indices = [index for index in range(shared) if sides[0][index]["role"] == "user"]
    return indices[-1] if indices else None


def _question(value: RowContent) -> dict[str, Any]:
    index = _question_index(value)
    assert index is not None
    return _conversations(value)[0].messages[index]


def _instruction(value: RowContent) -> str:
    question = _question(value)
    return str(question.get("instruction") or question["content"])


def _last_message(value: RowContent) -> str:
    return str(_conversations(value)[0].messages[-1]["content"])


def _replace_instruction(conversation: Conversation, index: int | None, text: str) -> Conversation:
    """The conversation with another instruction; alpaca's input stays."""
    assert index is not None
    question = conversation.messages[index]
    new = {**question, "content": text}
    if "instruction" in question:
        extra = question.get("input") or ""
        content = f"{text}\n\n{extra}" if extra else text
        new |= {"content": content, "instruction": text}
    messages = [*conversation.messages[:index], new, *conversation.messages[index + 1 :]]
    return replace(conversation, messages=messages)


def _user_message(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
