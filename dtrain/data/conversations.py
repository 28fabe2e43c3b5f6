"""Parse conversations: messages with role/content or from/value, tools and tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import unique_keys

Messages = list[dict[str, Any]]

# Role in a row → standard role.
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
SHAREGPT_ROLES = ("human", "gpt", "chatgpt", "bing", "bard", "observation", "function_call")
ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = (*ARGUMENT_KEYS, "name", "id", "type", "index")
NAME_FUNCTION = 'add its name: {"function": {"name": …}}'
CALL_ROLES = ("function_call", "tool_call")  # the text of such a turn is a call as JSON

# Keys that say whether a turn has loss, of OpenAI, axolotl, ms-swift, LLaMA-Factory, …
TRAIN_FLAGS = (
    "weight", "train", "training", "trainable", "train_on_turn", "train_detail",
    "loss", "loss_weight", "loss_mask", "masked",
)  # fmt: skip
WHOLE_TURN = "loss is on or off for a whole turn: change or remove the key"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # as in transformers
TEXT_TYPES = (None, "text", "input_text", "output_text")
REASONING_TYPES = ("reasoning", "thinking")
MEDIA = (
    "image", "images", "image_url", "input_image", "audio", "audios", "audio_url", "input_audio",
    "video", "videos", "video_url",
)  # fmt: skip
EMPTY_VALUES: tuple[Any, ...] = (None, "", [], {})
TEXT_KEYS = ("text", "value", "reasoning", "thinking", "content")


@dataclass(frozen=True)
class Conversation:
    """A conversation, and the tools that the model may call in it, as JSON schemas.

    A message has `role` (standard if the row's role has a standard meaning), `content` (a text),
    the other keys of the row's message, and if they apply:

    - `reasoning_content`, `tool_calls`;
    - `train`: whether the row says that the turn has loss;
    - `written_role`: the role in the row, if it is not the format's name for the role;
    - `parts`: the texts that `content` joins, if there are several.
    """

    messages: Messages
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Preference:
    """A chosen and a rejected conversation with the same prompt; one of them may be missing."""

    chosen: Conversation | None
    rejected: Conversation | None


def parse_messages(value: Any, column: str, where: str) -> Messages:
    """Parse a list of messages with role/content, or of turns with from/value.

    Raises:
        UserError: the value is not such a list; the error names the message.
    """
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type_name(value)
        raise UserError(f"`{column}` must be a list of messages, not {kind}", where=where)
    return [_message(item, f"{column}[{n}]", where) for n, item in enumerate(value)]


def _message(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"`{name}` must be an object, not {type_name(value)}", where=where)
    sharegpt = "from" in value and "role" not in value
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if media := next((key for key in MEDIA if value.get(key)), None):
        raise _not_text(f"{name}.{media}", media, where)
    calls = _raw_calls(value, name, where)
    for key in (role_key, content_key):
        if key not in value and not (key == content_key and calls):
            raise UserError(f"`{name}` has no `{key}`", where=where)
    parsed_keys = {
        role_key,
        content_key,
        "tool_calls",
        "function_call",
        *TRAIN_FLAGS,
        *REASONING_KEYS,
    }
    message = {key: v for key, v in value.items() if v is not None and key not in parsed_keys}
    message |= _role(check_text(value[role_key], f"{name}.{role_key}", where), sharegpt)
    text = "" if calls and value.get(content_key) is None else value.get(content_key)
    content = _parse_content(text, f"{name}.{content_key}", where)
    if calls:
        content.calls[:0] = calls if isinstance(calls, list) else [calls]
    elif value[role_key].strip().lower() in CALL_ROLES:
        call = _parse_json("\n".join(content.texts), f"{name}.{content_key}", where)
        content.calls.extend(call if isinstance(call, list) else [call])
        content.texts.clear()
    message["content"] = "\n".join(content.texts)
    if len(content.texts) > 1:
        message["parts"] = content.texts
    reasoning = [*_reasoning(value, name, where), *content.reasoning]
    optional = {
        "reasoning_content": "\n".join(reasoning) or None,
        "tool_calls": _calls(content.calls, name, where) or None,
        "train": _train_flag(value, name, where, content.flags),
    }
    return message | {key: v for key, v in optional.items() if v is not None}


def _raw_calls(value: dict[str, Any], name: str, where: str) -> Any:
    """`tool_calls`, or OpenAI's older `function_call`."""
    calls, legacy = value.get("tool_calls"), value.get("function_call")
    if calls and legacy:
        message = f"`{name}` has both `tool_calls` and `function_call`"
        raise UserError(message, where=where, fix="keep one of them")
    return calls or ([{"function": legacy}] if legacy else None)


def _role(written: str, sharegpt: bool) -> dict[str, str]:
    """The standard role, and the role in the row if it is different."""
    role = ROLES.get(written.strip().lower(), written)
    if role == written or (sharegpt and written in SHAREGPT_ROLES):
        return {"role": role}
    return {"role": role, "written_role": written}


@dataclass(frozen=True)
class _Content:
    """The content of a message: its texts, its reasoning and its tool calls."""

    texts: list[str]
    reasoning: list[str]
    calls: list[Any]
    flags: list[bool | None]  # whether each block has loss


def _parse_content(value: Any, name: str, where: str) -> _Content:
    """Parse a text, or a list of blocks, each a text or an object with a type and a text.

    Raises:
        UserError: it is neither, or a block is an image, audio, video, …
    """
    content = _Content([], [], [], [])
    if not isinstance(value, list) or not value:
        content.texts.append(check_text(value, name, where))
        return content
    for index, item in enumerate(value):
        item_name = f"{name}[{index}]"
        if isinstance(item, str):
            content.texts.append(check_text(item, item_name, where))
            content.flags.append(None)
            continue
        if not isinstance(item, dict):
            message = f"`{item_name}` must be a text or an object, not {type_name(item)}"
            fix = 'write a text, or {"type": "text", "text": …}'
            raise UserError(message, where=where, fix=fix)
        block = {key: v for key, v in item.items() if v is not None}
        content.flags.append(_train_flag(block, item_name, where))
        kind = block.get("type")
        if kind in TEXT_TYPES and (media := next((key for key in MEDIA if block.get(key)), None)):
            raise _not_text(item_name, media, where)
        key = next((key for key in TEXT_KEYS if key in block), None)
        if kind in TEXT_TYPES and key:
            content.texts.append(check_text(block[key], f"{item_name}.{key}", where))
        elif kind in REASONING_TYPES and key:
            content.reasoning.append(check_text(block[key], f"{item_name}.{key}", where))
        elif kind in CALL_ROLES:
            text = check_text(block.get("value"), f"{item_name}.value", where)
            content.calls.append(_parse_json(text, f"{item_name}.value", where))
        else:
            raise _not_text(item_name, kind or ", ".join(map(str, block)) or "nothing", where)
    return content


def _not_text(name: str, kind: object, where: str) -> UserError:
    return UserError(
        f"`{name}` is not a text: {kind}",
        where=where,
        fix="dtrain trains on text: remove the row, or its images, audio, videos and files",
    )


def _reasoning(value: dict[str, Any], name: str, where: str) -> list[str]:
    """The reasoning of a message; several keys may contain the same text."""
    texts = [
        check_text(value[key], f"{name}.{key}", where)
        for key in REASONING_KEYS
        if value.get(key) is not None
    ]
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _train_flag(
    value: dict[str, Any], name: str, where: str, block_flags: Sequence[bool | None] = ()
) -> bool | None:
    """Whether the row says that this turn has loss; None if it says nothing.

    `masked: false` says nothing: tables contain it for every turn.

    Args:
        value: the turn.
        name: of the turn, for messages.
        where: file and line, for messages.
        block_flags: the flag of each block of its content.

    Raises:
        UserError: a flag is neither true nor false, or two flags disagree.
    """
    values: dict[str, bool] = {}
    for key in TRAIN_FLAGS:
        flag = value.get(key)
        if flag is None:
            continue
        if key == "train_detail" or not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise UserError(
                f"`{name}.{key}` must be 0 or 1 (or false or true), not {str(flag)[:40]}",
                where=where,
                fix=WHOLE_TURN,
            )
        if key != "masked":
            values[key] = bool(flag)
        elif flag:
            values[key] = False
    if len(set(block_flags)) > 1:
        message = f"the blocks of `{name}` differ in whether they have loss"
        raise UserError(message, where=where, fix=WHOLE_TURN)
    if block_flags and block_flags[0] is not None:
        values["content"] = block_flags[0]
    if len(set(values.values())) > 1:
        message = f"the keys {', '.join(values)} of `{name}` contradict each other"
        raise UserError(message, where=where, fix="keep one of these keys")
    return next(iter(values.values()), None)


def apply_row_train_flag(conversation: Conversation, row: Mapping[str, Any]) -> Conversation:
    """The conversation without loss if its row says so; flags of its turns take precedence.

    The column may have another meaning, so other values are ignored.
    """
    off = {key for key in TRAIN_FLAGS if row.get(key) is not None and row[key] == (key == "masked")}
    if not off:
        return conversation
    return replace(
        conversation, messages=[{"train": False, **message} for message in conversation.messages]
    )


def messages_to_row(messages: Messages) -> Messages:
    """The messages as in a row; `parse_messages` is the inverse."""
    rows = []
    for message in messages:
        row = {k: v for k, v in message.items() if k not in ("written_role", "parts")}
        row["role"] = message.get("written_role", message["role"])
        if "parts" in message:
            row["content"] = [{"type": "text", "text": text} for text in message["parts"]]
        rows.append(row)
    return rows


def _calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Tool calls, with their arguments as objects (OpenAI writes them as JSON texts)."""
    calls = []
    for index, call in enumerate(value if isinstance(value, list) else [value]):
        item_name = f"{name}.tool_calls[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"`{item_name}` has no function name", where=where, fix=NAME_FUNCTION)
        arguments = _arguments(function, item_name, where)
        call_id = {"id": call["id"]} if call.get("id") is not None else {}
        parsed = {"name": function["name"], "arguments": arguments}
        calls.append({**call_id, "type": "function", "function": parsed})
    return calls


def _arguments(function: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The arguments of a call; Llama 3 names them `parameters`.

    Raises:
        UserError: they are not an object, or have another name.
    """
    key = next((key for key in ARGUMENT_KEYS if function.get(key) not in (None, "")), None)
    if key is None:
        if unknown := [k for k, v in function.items() if k not in CALL_KEYS and v]:
            message = f"`{name}` has no `arguments`, but {', '.join(unknown)}"
            raise UserError(message, where=where, fix="rename them to `arguments`")
        return {}
    arguments = function[key]
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, f"{name}.{key}", where)
    if not isinstance(arguments, dict):
        message = f"`{name}.{key}` must be an object, not {type_name(arguments)}"
        raise UserError(message, where=where, fix='name each argument: {"city": "Rome"}')
    return arguments


def parse_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Parse the column `tools`: a list of JSON schemas, or the same as a JSON text."""
    if isinstance(value, str):
        value = _parse_json(value, "tools", where) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError("`tools` must be a list of JSON schemas", where=where)
    tools = [s if "function" in s else {"type": "function", "function": s} for s in value]
    for index, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            message = f"`tools[{index}]` has no function name"
            raise UserError(message, where=where, fix=NAME_FUNCTION)
    return tools


def _parse_json(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{name}` is not JSON: {error}", where=where) from error


def check_text(value: Any, name: str, where: str) -> str:
    """The value, if it is a text that a tokenizer accepts.

    Args:
        value: of a row.
        name: of the value, for the message.
        where: file and line, for the message.

    Raises:
        UserError: it is not a text, or contains a NUL or an unpaired surrogate.
    """
    if not isinstance(value, str):
        raise UserError(f"`{name}` must be a text, not {type_name(value)}", where=where)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape it; no tokenizer accepts it
        message = f"`{name}` contains an unpaired surrogate at character {error.start}"
        raise UserError(message, where=where, fix="fix or remove this row") from error
    if "\0" in value:
        message = f"`{name}` contains a NUL at character {value.index(chr(0))}"
        raise UserError(message, where=where, fix="fix or remove this row")
    return value


def type_name(value: Any) -> str:
    """The type of a JSON value, for a message."""
    names = {type(None): "null", list: "a list", dict: "an object", str: "a text", bool: "a bool"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "this")
