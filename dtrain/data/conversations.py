"""Messages in the two ways people write them, with tools and calls of them, into one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import unique_keys

Messages = list[dict[str, Any]]

# sharegpt's names of who speaks
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class Talk:
    """A conversation, and the tools that the model may call in it, as JSON schemas."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Pair:
    """A wanted and an unwanted conversation with the same prompt; one of them may be missing."""

    wanted: Talk | None
    unwanted: Talk | None


def as_messages(value: Any, column: str, where: str) -> Messages:
    """A list of messages with role and content, or of turns with from and value.

    Raises:
        UserError: it is not one, naming the message at fault.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind_of_value(value)
        raise UserError(f"`{column}` must be a list of messages, not {what}", where=where)
    return [_message(item, f"{column}[{n}]", where) for n, item in enumerate(value)]


def _message(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"`{name}` must be an object, not {kind_of_value(value)}", where=where)
    if "from" in value and "role" not in value:
        return _turn(value, name, where)
    calls = value.get("tool_calls") or None
    for field in ("role", "content"):
        if field not in value and not (field == "content" and calls):
            raise UserError(f"`{name}` has no `{field}`", where=where)
    message = {key: v for key, v in value.items() if v is not None}
    message["role"] = checked_text(value["role"], f"{name}.role", where)
    content = "" if calls and value.get("content") is None else value.get("content")
    message["content"] = checked_text(content, f"{name}.content", where)
    if calls:
        message["tool_calls"] = _calls(calls, name, where)
    return message


def _turn(value: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    speaker = checked_text(value["from"], f"{name}.from", where)
    if "value" not in value:
        raise UserError(f"`{name}` has no `value`", where=where)
    text = checked_text(value["value"], f"{name}.value", where)
    role = ROLES.get(speaker, speaker)
    if speaker != "function_call":
        return {"role": role, "content": text}
    call = _parsed(text, f"{name}.value", where)
    calls = [{"function": one} for one in (call if isinstance(call, list) else [call])]
    return {"role": role, "content": "", "tool_calls": _calls(calls, name, where)}


def _calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Calls of tools; arguments as an object, which OpenAI writes as a text of JSON."""
    calls = []
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        own = f"{name}.tool_calls[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"`{own}` names no function", where=where)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{own}.arguments", where)
        made = {"name": function["name"], "arguments": arguments}
        beside = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append({**beside, "type": "function", "function": made})
    return calls


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of JSON schemas, or the same as a text of JSON."""
    if isinstance(value, str):
        value = _parsed(value, "tools", where) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError("`tools` must be a list of JSON schemas", where=where)
    return [s if "function" in s else {"type": "function", "function": s} for s in value]


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{name}` is not JSON: {error}", where=where) from error


def checked_text(value: Any, name: str, where: str) -> str:
    """The value, if it is a text that a tokenizer takes.

    Raises:
        UserError: naming it.
    """
    if not isinstance(value, str):
        raise UserError(f"`{name}` must be a text, not {kind_of_value(value)}", where=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character; no tokenizer takes it
        what = f"`{name}` holds half a character at place {error.start}"
        raise UserError(what, where=where, fix="mend or remove the row") from error
    if "\0" in value:
        what = f"`{name}` holds a NUL at place {value.index(chr(0))}"
        raise UserError(what, where=where, fix="mend or remove the row")
    return value


def kind_of_value(value: Any) -> str:
    """'a list', 'null', …, for a message."""
    names = {type(None): "null", list: "a list", dict: "an object", str: "a text", bool: "a bool"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "this")
