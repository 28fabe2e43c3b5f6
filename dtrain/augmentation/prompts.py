"""What is asked for a row, and the row that an answer makes.

rewrite         the instruction in other words; all that follows it stays: an answer, calls of
                tools with their results, or both answers of a pair
answers         another answer to the same conversation
backtranslate   the instruction that a text answers (Li et al., arXiv:2308.06259)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from dtrain.data.conversations import Conversation, Messages, Preference
from dtrain.data.formats import RowContent
from dtrain.data_quality.row_checks import key

How = Literal["rewrite", "answers", "backtranslate"]

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

_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_TAGS = re.compile(r"^<(instruction|text)>\s*(.*?)\s*</\1>$", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A row that something can be made of.

    Attributes:
        number: of the row among all rows of the source, from 0.
        place: file and line.
    """

    number: int
    place: str
    value: RowContent


def request(value: RowContent, how: How) -> Messages | None:
    """What to ask the model for a row; None where `unfit` says why not."""
    if unfit(value, how):
        return None
    if how == "rewrite":
        return [_user(REWRITE.format(text=_instruction(value)))]
    if how == "backtranslate":
        return [_user(BACKTRANSLATE.format(text=value if isinstance(value, str) else _last(value)))]
    return [{"role": m["role"], "content": m["content"]} for m in _sides(value)[0].messages[:-1]]


def unfit(value: RowContent, how: How) -> str:
    """Why nothing can be made of a row; empty if something can.

    A reply of the model is one text: it can be a new instruction to any row that has one, but no
    calls of tools, and nobody has said which answer of a new pair is the better one.
    """
    if isinstance(value, str):
        return "" if how == "backtranslate" and value.strip() else "a text without an instruction"
    answered = all(talk.messages[-1]["role"] == "assistant" for talk in _sides(value))
    if not answered or _place(value) is None:
        return "no answer to a person at its end"
    if how == "rewrite":
        return ""
    if isinstance(value, Preference):
        return "preferences between answers"
    if value.tools or any(m.get("tool_calls") or m["role"] == "tool" for m in value.messages):
        return "with tools"
    if value.messages[-2]["role"] != "user":
        return "no answer to a person at its end"
    return "" if how == "answers" or _last(value).strip() else "an empty answer"


def made(value: RowContent, how: How, reply: str) -> RowContent:
    """The row that the model's reply makes of a row that `request` took."""
    text = cleaned(reply, how)
    if isinstance(value, str):
        return Conversation([_user(text), {"role": "assistant", "content": value}])
    if isinstance(value, Preference):
        return Preference(*(side and _asked(side, _place(value), text) for side in _both(value)))
    if how == "answers":
        *earlier, answer = value.messages
        return replace(value, messages=[*earlier, {**answer, "content": text}])
    return _asked(value, _place(value), text)


def cleaned(reply: str, how: How) -> str:
    """A reply without its thoughts, and without the tags that some models repeat."""
    text = _THOUGHT.sub("", reply).strip()
    match = None if how == "answers" else _TAGS.match(text)
    return match.group(2) if match else text


def side(row: Row, how: How) -> tuple[int, str] | None:
    """What a made row must not repeat, and the group of rows in which it must not.

    A question among those with the same input (alpaca), an answer among those to its row. None
    where there is no such part.
    """
    if unfit(row.value, "rewrite"):
        return None
    if how == "answers":
        return (key(f"row {row.number}"), _last(row.value)) if not unfit(row.value, how) else None
    return key(str(_question(row.value).get("input") or "")), _instruction(row.value)


def _both(pair: Preference) -> tuple[Conversation | None, Conversation | None]:
    return pair.chosen, pair.rejected


def _sides(value: RowContent) -> list[Conversation]:
    """The conversations of a row: both of a pair."""
    if isinstance(value, Preference):
        return [talk for talk in _both(value) if talk]
    return [value] if isinstance(value, Conversation) else []


def _place(value: RowContent) -> int | None:
    """Which message the last question of a person is, before all answers of a pair."""
    sides = [talk.messages for talk in _sides(value)]
    shared = 0
    while all(len(m) > shared for m in sides) and all(m[shared] == sides[0][shared] for m in sides):
        shared += 1
    asked = [at for at in range(shared) if sides[0][at]["role"] == "user"]
    return asked[-1] if asked else None


def _question(value: RowContent) -> dict[str, Any]:
    place = _place(value)
    assert place is not None
    return _sides(value)[0].messages[place]


def _instruction(value: RowContent) -> str:
    question = _question(value)
    return str(question.get("instruction") or question["content"])


def _last(value: RowContent) -> str:
    return str(_sides(value)[0].messages[-1]["content"])


def _asked(talk: Conversation, place: int | None, text: str) -> Conversation:
    """The conversation with another instruction; what alpaca calls its input stays."""
    assert place is not None
    question = talk.messages[place]
    new = {**question, "content": text}
    if "instruction" in question:
        extra = question.get("input") or ""
        content = f"{text}\n\n{extra}" if extra else text
        new |= {"content": content, "instruction": text}
    return replace(talk, messages=[*talk.messages[:place], new, *talk.messages[place + 1 :]])


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
