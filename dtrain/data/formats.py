"""Convert a row of a known format into a text, a conversation or a preference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.core.errors import UserError
from dtrain.data.conversations import (
    EMPTY_VALUES,
    MEDIA,
    TRAIN_FLAGS,
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

ORIGIN = "origin"  # the column in which `dtrain data extract` says where a row comes from

RowContent = str | Conversation | Preference
Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """A data format: an entry of ROW_FORMATS, whose name stands in the schema's `format` too.

    Attributes:
        required: columns that every row has.
        optional: columns that are read if present.
        parse: makes the content from the columns of a row and its location.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Row, str], RowContent]


def convert_row(raw: Any, row_format: str, columns: Mapping[Any, str], where: str) -> RowContent:
    """The content of a row.

    Args:
        raw: the parsed row.
        row_format: a key of ROW_FORMATS.
        columns: the format's name of a column → its name in the file.
        where: file and line, for messages.

    Raises:
        UserError: the row does not have that format.
    """
    if not isinstance(raw, dict):
        raise UserError(f"a row must be an object, not {type_name(raw)}", where=where)
    known = ROW_FORMATS[row_format]
    for column in known.required:
        if columns.get(column, column) not in raw:
            raise _missing(columns.get(column, column), list(raw), row_format, where)
    row = {
        column: raw[columns.get(column, column)]
        for column in (*known.required, *known.optional)
        if columns.get(column, column) in raw
    }
    for column in MEDIA:
        if row.get(column):
            message = f"the row has {column}, but dtrain trains on text only"
            raise UserError(message, where=where, fix="remove the row or the column")
    content = known.parse(row, where)
    return apply_row_train_flag(content, row) if isinstance(content, Conversation) else content


def unread_columns(raw: Any, row_format: str, columns: Mapping[Any, str]) -> tuple[str, ...]:
    """Names of a row's columns that hold something and that the format does not read."""
    known = ROW_FORMATS[row_format]
    read = {ORIGIN} | {columns.get(column, column) for column in (*known.required, *known.optional)}
    return tuple(
        str(name) for name, value in raw.items() if name not in read and value not in EMPTY_VALUES
    )


def detect_format(raw: Any, columns: Mapping[Any, str], where: str) -> str:
    """The format whose columns a row has; if several fit, the most specific one.

    Raises:
        UserError: no format fits.
    """
    if not isinstance(raw, dict):
        raise UserError(f"a row must be an object, not {type_name(raw)}", where=where)
    for name, known in ROW_FORMATS.items():
        has = {c for c in (*known.required, *known.optional) if columns.get(c, c) in raw}
        if has.issuperset(known.required) and (name != "kto" or has & {"messages", "prompt"}):
            return name
    raise UserError(
        f"no known format has the columns {', '.join(map(str, raw)) or '(none)'}",
        where=where,
        fix="set `format`, and map the columns: `columns: {instruction: question}`",
    )


def _missing(column: str, names: list[Any], row_format: str, where: str) -> UserError:
    return UserError(
        f"column `{column}` is missing; the row has {', '.join(map(str, names)) or 'no columns'}",
        where=where,
        fix=f"format: {row_format} needs {', '.join(ROW_FORMATS[row_format].required)}; map other "
        "names with `columns`",
    )


def _text(row: Row, where: str) -> str:
    return check_text(row["text"], "text", where)


def _alpaca(row: Row, where: str) -> Conversation:
    """A single exchange, which keeps `instruction` and `input` for templates that read them."""
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
    """Earlier exchanges: a list of [question, answer] lists."""
    if not isinstance(value, list):
        raise UserError("`history` must be a list of questions and answers", where=where)
    messages: Messages = []
    for index, exchange in enumerate(value):
        name = f"history[{index}]"
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise UserError(f"`{name}` must be a question and an answer", where=where)
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            messages.append({"role": role, "content": check_text(text, name, where)})
    return messages


def _system(row: Row, where: str) -> Messages:
    text = check_text(row.get("system") or "", "system", where)
    return [{"role": "system", "content": text}] if text else []


def _conversation(column: str) -> Callable[[Row, str], Conversation]:
    def parse(row: Row, where: str) -> Conversation:
        messages = [*_system(row, where), *parse_messages(row[column], column, where)]
        return Conversation(messages, _tools(row, where))

    return parse


def _tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    """The row's `tools`, or OpenAI's older `functions`."""
    return parse_tools(row.get("tools") or row.get("functions"), where)


def _prompt_completion(row: Row, where: str) -> Conversation:
    answer = _answer(row["completion"], "completion", where)
    return Conversation([*_prompt(row, where), *answer], _tools(row, where))


def _prompt(row: Row, where: str) -> Messages:
    """The messages before the answer, from a text or a list of messages."""
    column = next((c for c in ("prompt", "messages", "conversations") if row.get(c)), None)
    if column is None:
        return _system(row, where)
    if isinstance(row[column], str):
        question = {"role": "user", "content": check_text(row[column], column, where)}
        return [*_system(row, where), question]
    return [*_system(row, where), *parse_messages(row[column], column, where)]


def _answer(value: Any, column: str, where: str) -> Messages:
    """An answer, from a text, a message or a list of messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": check_text(value, column, where)}]
    return parse_messages([value] if isinstance(value, dict) else value, column, where)


def _preference(row: Row, where: str) -> Preference:
    prompt, tools = _prompt(row, where), _tools(row, where)
    chosen, rejected = (_answer(row[c], c, where) for c in ("chosen", "rejected"))
    return Preference(
        Conversation([*prompt, *chosen], tools), Conversation([*prompt, *rejected], tools)
    )


def _kto(row: Row, where: str) -> Preference:
    value = row["label"]
    if isinstance(value, str) and value.lower() in ("true", "false"):  # as in a CSV file
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise UserError(f"`label` must be true or false, not {type_name(value)}", where=where)
    messages = _prompt(row, where)
    if "completion" in row:
        messages += _answer(row["completion"], "completion", where)
    if not messages:
        raise UserError(
            "the row has neither `messages` nor `prompt` with `completion`", where=where
        )
    conversation = Conversation(messages, _tools(row, where))
    return Preference(conversation, None) if value else Preference(None, conversation)


_COMMON = ("system", "tools", "functions", *MEDIA, *TRAIN_FLAGS)
# In the order in which `format: auto` tries them.
ROW_FORMATS = {
    "preference": RowFormat(
        ("chosen", "rejected"), ("prompt", "messages", "conversations", *_COMMON), _preference
    ),
    "kto": RowFormat(
        ("label",), ("messages", "prompt", "completion", "conversations", *_COMMON), _kto
    ),
    "messages": RowFormat(("messages",), _COMMON, _conversation("messages")),
    "sharegpt": RowFormat(("conversations",), _COMMON, _conversation("conversations")),
    "alpaca": RowFormat(
        ("instruction", "output"), ("input", "system", "history", *MEDIA, *TRAIN_FLAGS), _alpaca
    ),
    "prompt_completion": RowFormat(("prompt", "completion"), _COMMON, _prompt_completion),
    "text": RowFormat(("text",), (), _text),
}


def to_row(value: RowContent) -> dict[str, Any]:
    """A row in a format that reads back as the same value; the inverse of `convert_row`."""
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
