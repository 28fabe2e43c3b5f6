"""Messages in the two ways people write them, with tools and calls of them, into one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import unique_keys

Messages = list[dict[str, Any]]

# Names of roles that rows use, and the standard ones that they mean.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "developer": "system",
    **{role: role for role in ("system", "user", "assistant", "tool")},
}
SHAREGPT = ("human", "gpt", "chatgpt", "bing", "bard", "observation", "function_call")  # its own
ARGUMENTS = ("arguments", "parameters")
KEYS_OF_CALLS = (*ARGUMENTS, "name", "id", "type", "index")
NAME_FUNCTION = 'name it: {"function": {"name": …}}'
CALL_ROLES = ("function_call", "tool_call")  # the text of such a turn is a call, as JSON

# Keys by which rows say whether a turn is learned: OpenAI, axolotl, ms-swift, LLaMA-Factory, …
MARKS = (
    "weight", "train", "training", "trainable", "train_on_turn", "train_detail",
    "loss", "loss_weight", "loss_mask", "masked",
)  # fmt: skip
WHOLE = "a turn is learned as a whole or not at all: change the mark or remove it"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # transformers knows the same
TEXT_TYPES = (None, "text", "input_text", "output_text")
REASONING_TYPES = ("reasoning", "thinking")
MEDIA = (
    "image", "images", "image_url", "input_image", "audio", "audios", "audio_url", "input_audio",
    "video", "videos", "video_url",
)  # fmt: skip
TEXTS_OF_PARTS = ("text", "value", "reasoning", "thinking", "content")


@dataclass(frozen=True)
class Conversation:
    """A conversation, and the tools that the model may call in it, as JSON schemas.

    A message has `role` (a standard one where the row's own has a standard meaning), `content` (a
    text), what else its row holds, and where they apply:

    - `reasoning_content`, `tool_calls`;
    - `train`: the row says that the turn is learned, or that it is not;
    - `written_role`: the row's own name of the role, where it is not that of its format;
    - `parts`: the texts of which `content` is joined, where there are several.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Preference:
    """A wanted and an unwanted conversation with the same prompt; one of them may be missing."""

    chosen: Conversation | None
    rejected: Conversation | None


def parse_messages(value: Any, column: str, where: str) -> Messages:
    """A list of messages with role and content, or of turns with from and value.

    Raises:
        UserError: it is not one, naming the message at fault.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else type_name(value)
        raise UserError(f"`{column}` must be a list of messages, not {what}", where=where)
    return [_message(item, f"{column}[{n}]", where) for n, item in enumerate(value)]


def _message(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"`{name}` must be an object, not {type_name(value)}", where=where)
    sharegpt = "from" in value and "role" not in value
    role, content = ("from", "value") if sharegpt else ("role", "content")
    if media := next((key for key in MEDIA if value.get(key)), None):
        raise _not_text(f"{name}.{media}", media, where)
    calls = _given_calls(value, name, where)
    for field in (role, content):
        if field not in value and not (field == content and calls):
            raise UserError(f"`{name}` has no `{field}`", where=where)
    left_out = {role, content, "tool_calls", "function_call", *MARKS, *REASONING_KEYS}
    message = {key: v for key, v in value.items() if v is not None and key not in left_out}
    message |= _role(check_text(value[role], f"{name}.{role}", where), sharegpt)
    text = "" if calls and value.get(content) is None else value.get(content)
    read = _read_content(text, f"{name}.{content}", where)
    if calls:
        read.calls[:0] = calls if isinstance(calls, list) else [calls]
    elif value[role].strip().lower() in CALL_ROLES:
        call = _parsed("\n".join(read.texts), f"{name}.{content}", where)
        read.calls.extend(call if isinstance(call, list) else [call])
        read.texts.clear()
    message["content"] = "\n".join(read.texts)
    if len(read.texts) > 1:
        message["parts"] = read.texts
    reasoning = [*_reasoning(value, name, where), *read.reasoning]
    return message | _optional(
        reasoning_content="\n".join(reasoning) or None,
        tool_calls=_calls(read.calls, name, where) or None,
        train=_mark(value, name, where, read.marks),
    )


def _optional(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _given_calls(value: dict[str, Any], name: str, where: str) -> Any:
    """`tool_calls`, or OpenAI's `function_call` of before them."""
    calls, legacy = value.get("tool_calls"), value.get("function_call")
    if calls and legacy:
        what = f"`{name}` has both `tool_calls` and `function_call`"
        raise UserError(what, where=where, fix="keep one of them")
    return calls or ([{"function": legacy}] if legacy else None)


def _role(written: str, sharegpt: bool) -> dict[str, str]:
    """The standard role, and the row's own where it is another."""
    role = ROLES.get(written.strip().lower(), written)
    if role == written or (sharegpt and written in SHAREGPT):
        return {"role": role}
    return {"role": role, "written_role": written}


@dataclass(frozen=True)
class _Content:
    """The content of a message: what it says, its reasoning, and its calls of tools."""

    texts: list[str]
    reasoning: list[str]
    calls: list[Any]
    marks: list[bool | None]  # of the parts


def _read_content(value: Any, name: str, where: str) -> _Content:
    """A text, or a list of parts, each a text or an object with a type and a text.

    Raises:
        UserError: it is neither, or a part is an image, a sound, a video, …
    """
    read = _Content([], [], [], [])
    if not isinstance(value, list) or not value:
        read.texts.append(check_text(value, name, where))
        return read
    for number, part in enumerate(value):
        own = f"{name}[{number}]"
        if isinstance(part, str):
            read.texts.append(check_text(part, own, where))
            read.marks.append(None)
            continue
        if not isinstance(part, dict):
            what = f"`{own}` must be a text or an object, not {type_name(part)}"
            fix = 'write a text, or {"type": "text", "text": …}'
            raise UserError(what, where=where, fix=fix)
        given = {key: v for key, v in part.items() if v is not None}
        read.marks.append(_mark(given, own, where))
        kind = given.get("type")
        if kind in TEXT_TYPES and (media := next((key for key in MEDIA if given.get(key)), None)):
            raise _not_text(own, media, where)
        key = next((key for key in TEXTS_OF_PARTS if key in given), None)
        if kind in TEXT_TYPES and key:
            read.texts.append(check_text(given[key], f"{own}.{key}", where))
        elif kind in REASONING_TYPES and key:
            read.reasoning.append(check_text(given[key], f"{own}.{key}", where))
        elif kind in CALL_ROLES:
            text = check_text(given.get("value"), f"{own}.value", where)
            read.calls.append(_parsed(text, f"{own}.value", where))
        else:
            raise _not_text(own, kind or ", ".join(map(str, given)) or "nothing", where)
    return read


def _not_text(name: str, kind: object, where: str) -> UserError:
    return UserError(
        f"`{name}` is not a text: {kind}",
        where=where,
        fix="dtrain trains on text: remove the row, or its images, sounds, videos and files",
    )


def _reasoning(value: dict[str, Any], name: str, where: str) -> list[str]:
    """What a message says of its reasoning; several keys may say the same."""
    given = [
        check_text(value[key], f"{name}.{key}", where)
        for key in REASONING_KEYS
        if value.get(key) is not None
    ]
    return list(dict.fromkeys(text for text in given if text.strip()))


def _mark(
    value: dict[str, Any], name: str, where: str, of_parts: Sequence[bool | None] = ()
) -> bool | None:
    """Whether the row says that this turn is learned; None where it does not say.

    `masked: false` says nothing: tables fill it in for every turn.

    Args:
        of_parts: the same of each part of its content.

    Raises:
        UserError: a mark is no yes or no, or two of them disagree.
    """
    said: dict[str, bool] = {}
    for key in MARKS:
        given = value.get(key)
        if given is None:
            continue
        if (
            key == "train_detail"
            or not isinstance(given, bool | int | float)
            or given not in (0, 1)
        ):
            raise UserError(
                f"`{name}.{key}` must be 0 or 1 (or false or true), not {str(given)[:40]}",
                where=where,
                fix=WHOLE,
            )
        if key != "masked":
            said[key] = bool(given)
        elif given:
            said[key] = False
    if len(set(of_parts)) > 1:
        what = f"the parts of `{name}` are not all marked as learned, or all as not learned"
        raise UserError(what, where=where, fix=WHOLE)
    if of_parts and of_parts[0] is not None:
        said["content"] = of_parts[0]
    if len(set(said.values())) > 1:
        what = f"`{name}` says both that it is learned and that it is not: {', '.join(said)}"
        raise UserError(what, where=where, fix="keep one of these keys")
    return next(iter(said.values()), None)


def apply_row_train_flag(talk: Conversation, row: Mapping[str, Any]) -> Conversation:
    """The conversation, none of it learned if its row says so; what a turn says counts more.

    Such a column can mean something else, so any other value says nothing.
    """
    no = {key for key in MARKS if row.get(key) is not None and row[key] == (key == "masked")}
    if not no:
        return talk
    return replace(talk, messages=[{"train": False, **message} for message in talk.messages])


def messages_to_row(messages: Messages) -> Messages:
    """The messages as a row holds them: `as_messages` reads the same again."""
    rows = []
    for message in messages:
        row = {k: v for k, v in message.items() if k not in ("written_role", "parts")}
        row["role"] = message.get("written_role", message["role"])
        if "parts" in message:
            row["content"] = [{"type": "text", "text": text} for text in message["parts"]]
        rows.append(row)
    return rows


def _calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Calls of tools; arguments as an object, which OpenAI writes as a text of JSON."""
    calls = []
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        own = f"{name}.tool_calls[{number}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"`{own}` names no function", where=where, fix=NAME_FUNCTION)
        arguments = _arguments(function, own, where)
        made = {"name": function["name"], "arguments": arguments}
        beside = {"id": call["id"]} if call.get("id") is not None else {}
        calls.append({**beside, "type": "function", "function": made})
    return calls


def _arguments(function: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The arguments of a call, which Llama 3 calls `parameters`.

    Raises:
        UserError: they are no object, or under another name.
    """
    key = next((key for key in ARGUMENTS if function.get(key) not in (None, "")), None)
    if key is None:
        if others := [k for k, v in function.items() if k not in KEYS_OF_CALLS and v]:
            what = f"`{name}` has no `arguments`; there is {', '.join(others)}"
            raise UserError(what, where=where, fix="call them `arguments`")
        return {}
    arguments = function[key]
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{name}.{key}", where)
    if not isinstance(arguments, dict):
        what = f"`{name}.{key}` must be an object, not {type_name(arguments)}"
        raise UserError(what, where=where, fix='name each argument: {"city": "Rome"}')
    return arguments


def parse_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """The column `tools`: a list of JSON schemas, or the same as a text of JSON."""
    if isinstance(value, str):
        value = _parsed(value, "tools", where) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError("`tools` must be a list of JSON schemas", where=where)
    tools = [s if "function" in s else {"type": "function", "function": s} for s in value]
    for number, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            what = f"`tools[{number}]` names no function"
            raise UserError(what, where=where, fix=NAME_FUNCTION)
    return tools


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{name}` is not JSON: {error}", where=where) from error


def check_text(value: Any, name: str, where: str) -> str:
    """The value, if it is a text that a tokenizer takes.

    Raises:
        UserError: naming it.
    """
    if not isinstance(value, str):
        raise UserError(f"`{name}` must be a text, not {type_name(value)}", where=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character; no tokenizer takes it
        what = f"`{name}` holds half a character at place {error.start}"
        raise UserError(what, where=where, fix="mend or remove the row") from error
    if "\0" in value:
        what = f"`{name}` holds a NUL at place {value.index(chr(0))}"
        raise UserError(what, where=where, fix="mend or remove the row")
    return value


def type_name(value: Any) -> str:
    """'a list', 'null', …, for a message."""
    names = {type(None): "null", list: "a list", dict: "an object", str: "a text", bool: "a bool"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "this")
