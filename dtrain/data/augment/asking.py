"""What is asked for a row, and the row that an answer makes.

rewrite         the instruction in other words, with the answer that it has
answers         another answer to the same conversation
backtranslate   the instruction that a text answers (Li et al., arXiv:2308.06259)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from dtrain.data.conversations import Messages, Talk
from dtrain.data.quality.examine import key
from dtrain.data.rows import Value

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
    value: Value


def request(value: Value, how: How) -> Messages | None:
    """What to ask the model for a row; None if nothing can be made of it.

    That are pairs, conversations with tools, and those that do not end with an answer to a person;
    of texts, only backtranslate makes something.
    """
    if how == "backtranslate":
        text = value if isinstance(value, str) else _answer(value)
        return [_user(BACKTRANSLATE.format(text=text))] if text and text.strip() else None
    if not isinstance(value, Talk) or _answer(value) is None:
        return None
    if how == "rewrite":
        return [_user(REWRITE.format(text=_instruction(value)))]
    return [{"role": m["role"], "content": m["content"]} for m in value.messages[:-1]]


def made(value: Value, how: How, reply: str) -> Talk:
    """The row that the model's reply makes of a row that `request` took."""
    text = cleaned(reply, how)
    if isinstance(value, str):
        return Talk([_user(text), {"role": "assistant", "content": value}])
    assert isinstance(value, Talk)
    *earlier, question, answer = value.messages
    if how == "answers":
        return replace(value, messages=[*earlier, question, {**answer, "content": text}])
    return replace(value, messages=[*earlier, _asked(question, text), answer])


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
    if not isinstance(row.value, Talk) or _answer(row.value) is None:
        return None
    if how == "answers":
        return key(f"row {row.number}"), str(row.value.messages[-1]["content"])
    question = row.value.messages[-2]
    return key(str(question.get("input") or "")), _instruction(row.value)


def _answer(value: Value) -> str | None:
    """The last answer of a conversation that a person began and no tool took part in."""
    if not isinstance(value, Talk) or value.tools or len(value.messages) < 2:
        return None
    if [m["role"] for m in value.messages[-2:]] != ["user", "assistant"]:
        return None
    if any(m.get("tool_calls") or m["role"] == "tool" for m in value.messages):
        return None
    return str(value.messages[-1]["content"])


def _instruction(value: Talk) -> str:
    question = value.messages[-2]
    return str(question.get("instruction") or question["content"])


def _asked(question: dict[str, Any], text: str) -> dict[str, Any]:
    """The question with another instruction; what alpaca calls its input stays."""
    if "instruction" not in question:
        return {**question, "content": text}
    extra = question.get("input") or ""
    content = f"{text}\n\n{extra}" if extra else text
    return {**question, "content": content, "instruction": text}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}
