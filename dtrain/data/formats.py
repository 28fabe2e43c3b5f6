"""One row of a known format into a text, a conversation, or a pair of conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.core.errors import UserError
from dtrain.data.conversations import (
    MARKS,
    MEDIA,
    Conversation,
    Messages,
    Preference,
    apply_row_train_flag,
    check_text,
    messages_to_row,
    parse_messages,
    parse_tools,
    type_name,
)

__all__ = [
    "ROW_FORMATS",
    "Conversation",
    "Messages",
    "Preference",
    "RowContent",
    "convert",
    "detect_format",
    "to_row",
]

RowContent = str | Conversation | Preference
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """A format: the columns that it needs, those it takes besides, and what it makes of a row."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    make: Callable[[Row, str], RowContent]


def convert(raw: Any, form: str, columns: Mapping[Any, str], where: str) -> RowContent:
    """What a row holds.

    Args:
        raw: the row as parsed.
        form: a format of the recipe, not auto.
        columns: format's name of a column → the file's own.
        where: file and line.

    Raises:
        UserError: the row is not of that format.
    """
    if not isinstance(raw, dict):
        raise UserError(f"a row must be an object, not {type_name(raw)}", where=where)
    known = ROW_FORMATS[form]
    for column in known.needs:
        if columns.get(column, column) not in raw:
            raise _missing(columns.get(column, column), list(raw), form, where)
    named = {
        column: raw[columns.get(column, column)]
        for column in (*known.needs, *known.takes)
        if columns.get(column, column) in raw
    }
    for column in MEDIA:
        if named.get(column):
            what = f"the row has {column}, and dtrain trains on text"
            raise UserError(what, where=where, fix="remove the row, or the column")
    value = known.make(named, where)
    return apply_row_train_flag(value, named) if isinstance(value, Conversation) else value


def detect_format(raw: Any, columns: Mapping[Any, str], where: str) -> str:
    """The format whose columns a row has; the one with more structure where several fit.

    Raises:
        UserError: none fits.
    """
    if not isinstance(raw, dict):
        raise UserError(f"a row must be an object, not {type_name(raw)}", where=where)
    for name, form in ROW_FORMATS.items():
        has = {c for c in (*form.needs, *form.takes) if columns.get(c, c) in raw}
        if has.issuperset(form.needs) and (name != "kto" or has & {"messages", "prompt"}):
            return name
    raise UserError(
        f"no known format has the columns {', '.join(map(str, raw)) or '(none)'}",
        where=where,
        fix="name `format`, and what the columns are called: `columns: {instruction: question}`",
    )


def _missing(column: str, names: list[Any], form: str, where: str) -> UserError:
    return UserError(
        f"column `{column}` is missing; there is {', '.join(map(str, names)) or 'nothing'}",
        where=where,
        fix=f"format: {form} needs {', '.join(ROW_FORMATS[form].needs)}; `columns` renames them",
    )


def _text(row: Row, where: str) -> str:
    return check_text(row["text"], "text", where)


def _alpaca(row: Row, where: str) -> Conversation:
    """One exchange; templates that know them see `instruction` and `input` apart as well."""
    instruction = check_text(row["instruction"], "instruction", where)
    extra = check_text(row.get("input") or "", "input", where)
    if not instruction.strip():  # the task is in `input` alone
        instruction, extra = extra, ""
    content = f"{instruction}\n\n{extra}" if extra else instruction
    user = {"role": "user", "content": content, "instruction": instruction, "input": extra}
    answer = check_text(row["output"], "output", where)
    earlier = _history(row.get("history") or [], where)
    return Conversation(
        [*_system(row, where), *earlier, user, {"role": "assistant", "content": answer}]
    )


def _history(value: Any, where: str) -> Messages:
    """Earlier exchanges as lists of two texts."""
    messages: Messages = []
    for number, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"`history[{number}]` must be a question and an answer", where=where)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            name = f"history[{number}]"
            messages.append({"role": role, "content": check_text(text, name, where)})
    return messages


def _system(row: Row, where: str) -> Messages:
    text = check_text(row.get("system") or "", "system", where)
    return [{"role": "system", "content": text}] if text else []


def _talk(column: str) -> Callable[[Row, str], Conversation]:
    def make(row: Row, where: str) -> Conversation:
        messages = [*_system(row, where), *parse_messages(row[column], column, where)]
        return Conversation(messages, _tools(row, where))

    return make


def _tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    """The row's `tools`, or OpenAI's `functions` of before."""
    return parse_tools(row.get("tools") or row.get("functions"), where)


def _prompt_completion(row: Row, where: str) -> Conversation:
    answer = _side(row["completion"], "completion", where)
    return Conversation([*_prompt(row, where), *answer], _tools(row, where))


def _prompt(row: Row, where: str) -> Messages:
    """What comes before the answer: a text, messages, or a conversation that has not ended."""
    column = next((c for c in ("prompt", "messages", "conversations") if row.get(c)), None)
    if column is None:
        return _system(row, where)
    if isinstance(row[column], str):
        question = {"role": "user", "content": check_text(row[column], column, where)}
        return [*_system(row, where), question]
    return [*_system(row, where), *parse_messages(row[column], column, where)]


def _side(value: Any, column: str, where: str) -> Messages:
    """An answer: a text, one message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": check_text(value, column, where)}]
    return parse_messages([value] if isinstance(value, dict) else value, column, where)


def _preference(row: Row, where: str) -> Preference:
    prompt, tools = _prompt(row, where), _tools(row, where)
    chosen, rejected = (_side(row[c], c, where) for c in ("chosen", "rejected"))
    return Preference(
        Conversation([*prompt, *chosen], tools), Conversation([*prompt, *rejected], tools)
    )


def _kto(row: Row, where: str) -> Preference:
    value = row["label"]
    if isinstance(value, str) and value.lower() in ("true", "false"):  # as csv has it
        value = value.lower() == "true"
    if not isinstance(value, bool):
        what = f"`label` must be true or false, not {type_name(value)}"
        raise UserError(what, where=where)
    messages = _prompt(row, where)
    if "completion" in row:
        messages += _side(row["completion"], "completion", where)
    if not messages:
        raise UserError("no `messages`, and no `prompt` with a `completion`", where=where)
    talk = Conversation(messages, _tools(row, where))
    return Preference(talk, None) if value else Preference(None, talk)


_BESIDE = ("system", "tools", "functions", *MEDIA, *MARKS)
# In the order in which `auto` tries them.
ROW_FORMATS = {
    "preference": Form(
        ("chosen", "rejected"), ("prompt", "messages", "conversations", *_BESIDE), _preference
    ),
    "kto": Form(("label",), ("messages", "prompt", "completion", "conversations", *_BESIDE), _kto),
    "messages": Form(("messages",), _BESIDE, _talk("messages")),
    "sharegpt": Form(("conversations",), _BESIDE, _talk("conversations")),
    "alpaca": Form(
        ("instruction", "output"), ("input", "system", "history", *MEDIA, *MARKS), _alpaca
    ),
    "prompt_completion": Form(("prompt", "completion"), _BESIDE, _prompt_completion),
    "text": Form(("text",), (), _text),
}


def to_row(value: RowContent) -> dict[str, Any]:
    """A row in a format that reads back as the same value; the inverse of `convert`."""
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Conversation):
        return {"messages": messages_to_row(value.messages), **_tools_column(value)}
    if value.chosen and value.rejected:
        sides = {"chosen": value.chosen, "rejected": value.rejected}
        rows = {name: messages_to_row(side.messages) for name, side in sides.items()}
        return {**rows, **_tools_column(value.chosen)}
    conversation = value.chosen or value.rejected
    assert conversation is not None
    messages = messages_to_row(conversation.messages)
    label = value.chosen is not None
    return {"messages": messages, "label": label, **_tools_column(conversation)}


def _tools_column(conversation: Conversation) -> dict[str, Any]:
    return {"tools": conversation.tools} if conversation.tools else {}
