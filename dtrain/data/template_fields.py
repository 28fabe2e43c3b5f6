"""Locate each text of a conversation in its rendering, by character offset.

The conversation is rendered a second time with markers (private use characters) around each text.
If that rendering without markers equals the first one, the offsets of the markers are those of the
texts, whatever the template does around them. Texts are never searched for, so a text that occurs
twice in the conversation, or in the template itself, cannot be confused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dtrain.data.conversations import Conversation, Messages

Style = Literal["around", "inside"]
STYLES: tuple[Style, Style] = ("around", "inside")

CONTENT, REASONING, INSTRUCTION, INPUT = "content", "reasoning", "instruction", "input"
CALL, ARGUMENT, TOOLS = "call", "argument", "tools"
TOOLS_INDEX = -1  # instead of the index of a message
FIRST_MARKER, LAST_MARKER = 0xF0010, 0x10FFFD
MARKER = re.compile(f"([{chr(FIRST_MARKER)}-{chr(LAST_MARKER)}])")
# A marker in ASCII JSON, and in the repr of a Python list.
ESCAPED = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})|\\U00(0f|10)([0-9a-f]{4})")
THINK = re.compile(r"(\s*<think>)?(.*)(</think>)(.*)", re.DOTALL)


class TemplateField(NamedTuple):
    """A text of a conversation.

    Attributes:
        message_index: of its message, or TOOLS_INDEX.
        kind: CONTENT, REASONING, …
        core: the text without blanks at its ends, which templates may strip; for an argument that
            is not a text, its value.
        begin, end: its markers; the same for a single marker.
        offset: characters of `core` before a single marker.
    """

    message_index: int
    kind: str
    core: Any
    begin: str
    end: str
    offset: int = 0


class FieldSpan(NamedTuple):
    """The position of a field in a rendering.

    Attributes:
        start, stop: character offsets, `stop` excluded.
        times: how often the template writes the field.
        as_written: the text there is the field's text, verbatim or escaped for JSON.
    """

    start: int
    stop: int
    times: int
    as_written: bool


class MarkedConversation:
    """A copy of a conversation with markers in its texts.

    Attributes:
        fields: all marked texts, in the order of the messages.
        conversation: the copy.
    """

    def __init__(
        self,
        conversation: Conversation,
        text: str,
        roles: list[str],
        style: Style,
        only: int | None = None,
    ) -> None:
        """Insert markers.

        Args:
            conversation: adapted to its template.
            text: its rendering.
            roles: standard role of each message.
            style: markers around each text, or a single marker inside of it, for templates that
                read its first and last characters.
            only: index of the only message to mark, or TOOLS_INDEX; None for all.
        """
        self.fields: list[TemplateField] = []
        self._style, self._roles, self._markers = style, roles, _unused_markers(text)
        messages: Messages = [
            self._message(index, message) if only in (None, index) else message
            for index, message in enumerate(conversation.messages)
        ]
        tools = conversation.tools
        if tools and only in (None, TOOLS_INDEX):
            tools = [self._tool(tool) for tool in tools]
        self.conversation = Conversation(messages, tools)

    def _message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        if message.get("reasoning_content"):
            marked["reasoning_content"] = self._text(index, REASONING, message["reasoning_content"])
        content, calls = message["content"], message.get("tool_calls")
        alone = not calls
        if isinstance(content, list):
            alone = alone and not any(part["text"].strip() for part in content)
            marked["content"] = [
                {**part, "text": self._text(index, CONTENT, part["text"], alone)}
                for part in content
            ]
        else:
            marked["content"] = self._content(index, content, alone)
        for kind in (INSTRUCTION, INPUT):
            if message.get(kind):
                marked[kind] = self._text(index, kind, message[kind])
        if calls:
            marked["tool_calls"] = [self._call(index, call) for call in calls]
        return marked

    def _content(self, index: int, content: str, alone: bool) -> str:
        match = THINK.fullmatch(content) if "</think>" in content else None
        if match and self._roles[index] == "assistant":
            opening, reasoning, closing, answer = match.groups(default="")
            reasoning = self._text(index, REASONING, reasoning)
            return opening + reasoning + closing + self._text(index, CONTENT, answer, alone)
        return self._text(index, CONTENT, content, alone)

    def _text(self, index: int, kind: str, text: str, even_empty: bool = False) -> str:
        core = text.strip()
        if not core:
            even_empty = even_empty and self._style == "around"
            return text + self._single(index, kind, "") if even_empty else text
        start = len(text) - len(text.lstrip())
        stop = start + len(core)
        if self._style == "inside":
            half = len(core) // 2
            middle = start + half
            return text[:middle] + self._single(index, kind, core, half) + text[middle:]
        field = TemplateField(index, kind, core, next(self._markers), next(self._markers))
        self.fields.append(field)
        return text[:start] + field.begin + core + field.end + text[stop:]

    def _single(self, index: int, kind: str, core: Any, offset: int = 0) -> str:
        marker = next(self._markers)
        self.fields.append(TemplateField(index, kind, core, marker, marker, offset))
        return marker

    def _call(self, index: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        marked = {
            **function,
            "name": self._text(index, CALL, function["name"]),
            "arguments": self._value(index, function["arguments"]),
        }
        return {**call, "function": marked}

    def _value(self, index: int, value: Any) -> Any:
        """Mark all texts in an argument; other values are marked at the end of their key."""
        if isinstance(value, str):
            return self._text(index, ARGUMENT, value)
        if isinstance(value, list):
            return [self._value(index, item) for item in value]
        if not isinstance(value, dict):
            return value
        marked = {}
        for key, inner in value.items():
            if not isinstance(inner, str | list | dict):
                key += self._single(index, ARGUMENT, inner)
            marked[key] = self._value(index, inner)
        return marked

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return tool
        return {
            **tool,
            "function": {**function, "name": self._text(TOOLS_INDEX, TOOLS, function["name"])},
        }


def _unused_markers(text: str) -> Iterator[str]:
    """Markers that do not occur in the text."""
    used = frozenset() if text.isascii() else frozenset(MARKER.findall(text))
    markers = map(chr, range(FIRST_MARKER, LAST_MARKER + 1))
    return (char for char in markers if char not in used) if used else markers


@dataclass(frozen=True)
class MarkedText:
    """A rendering, separated into its text and its markers.

    Attributes:
        text: without markers.
        markers: (offset in `text`, marker) in the order of the text.
    """

    text: str
    markers: list[tuple[int, str]]

    def on(self, text: str, fields: list[TemplateField]) -> MarkedText | None:
        """The same markers on a text that differs only in blanks; None if it differs otherwise.

        A template that removes words of a text may also strip blanks next to them.
        """
        if self.text == text:
            return self
        if "".join(self.text.split()) != "".join(text.split()):
            return None
        begins = {field.begin for field in fields if field.begin != field.end}
        solid = [offset for offset, char in enumerate(text) if not char.isspace()] + [len(text)]
        markers, count, done = [], 0, 0
        for offset, marker in self.markers:
            count += len("".join(self.text[done:offset].split()))
            done = offset
            at = solid[count] if marker in begins else solid[count - 1] + 1 if count else 0
            markers.append((at, marker))
        return MarkedText(text, markers)

    @classmethod
    def of(cls, rendering: str, fields: list[TemplateField]) -> MarkedText:
        """Separate text and markers; private use characters of the conversation are text."""
        if "\\u" in rendering or "\\U" in rendering:
            rendering = ESCAPED.sub(_unescaped, rendering)
        inserted = {*(field.begin for field in fields), *(field.end for field in fields)}
        runs = MARKER.split(rendering)
        kept, markers, size = runs[:1], [], len(runs[0])
        for marker, run in zip(runs[1::2], runs[2::2], strict=True):
            if marker in inserted:
                markers.append((size, marker))
            else:
                run = marker + run
            kept.append(run)
            size += len(run)
        return cls("".join(kept), markers)


def _unescaped(match: re.Match[str]) -> str:
    high, low, plane, rest = match.groups()
    if plane:
        code = int(plane + rest, 16)
    else:
        code = 0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00
    return chr(code) if FIRST_MARKER <= code <= LAST_MARKER else match[0]


@dataclass(frozen=True)
class LocatedFields:
    """The fields of a conversation in its rendering.

    Attributes:
        text: the rendering.
        fields: each field and its span; None if the template leaves it out.
        edges: (offset, index of the message) of each start and end of a field, in order; if a
            field is written twice, the second time belongs to no message (None).
        marking: the marked conversation, for more renderings.
    """

    text: str
    fields: list[tuple[TemplateField, FieldSpan | None]]
    edges: list[tuple[int, int | None]]
    marking: MarkedConversation


class HiddenFieldError(Exception):
    """A template changes a text so that it cannot be located."""

    def __init__(self, message_index: int) -> None:
        super().__init__(message_index)
        self.message_index = message_index


def locate_fields(
    conversation: Conversation, roles: list[str], text: str, render: Callable[[Conversation], str]
) -> LocatedFields:
    """Locate all texts of a conversation in its rendering; usually takes one more rendering.

    Args:
        conversation: adapted to the template.
        roles: standard role of each message.
        text: its rendering.
        render: the template.

    Raises:
        HiddenFieldError: markers in a message change the rest of the rendering, or the template
            writes only a part of the message's text.
    """
    marking = MarkedConversation(conversation, text, roles, "around")
    if (marked := _try(marking, text, render)) is not None:
        return _located(text, [(marking, marked)], marking)
    inside = MarkedConversation(conversation, text, roles, "inside")
    if (marked := _try(inside, text, render)) is not None:
        return _located(text, [(inside, marked)], marking)
    by_message = []
    # The template's output depends on some text: mark one message at a time.
    for index in range(TOOLS_INDEX, len(conversation.messages)):
        for style in STYLES:
            one_message = MarkedConversation(conversation, text, roles, style, index)
            empty = MarkedText(text, [])
            marked = _try(one_message, text, render) if one_message.fields else empty
            if marked is not None:
                by_message.append((one_message, marked))
                break
        else:
            raise HiddenFieldError(index)
    return _located(text, by_message, marking)


def _try(
    marking: MarkedConversation, text: str, render: Callable[[Conversation], str]
) -> MarkedText | None:
    """The marked rendering; None if it is not the text with markers in it."""
    try:
        marked = MarkedText.of(render(marking.conversation), marking.fields)
    except MemoryError:
        raise
    except Exception:  # a template may raise because of a marker
        return None
    return marked.on(text, marking.fields)


def _located(
    text: str, renderings: list[tuple[MarkedConversation, MarkedText]], marking: MarkedConversation
) -> LocatedFields:
    fields: list[tuple[TemplateField, FieldSpan | None]] = []
    edges: list[tuple[int, int | None]] = []
    for marked_conversation, marked in renderings:
        offsets: dict[str, list[int]] = {}
        for offset, marker in marked.markers:
            offsets.setdefault(marker, []).append(offset)
        field_spans = [(field, _span(field, offsets, text)) for field in marked_conversation.fields]
        fields += field_spans
        edges += _edges(field_spans, marked)
    if len(renderings) > 1:
        edges.sort(key=lambda edge: edge[0])  # stable: messages at one offset keep their order
    return LocatedFields(text, fields, edges, marking)


def _edges(
    field_spans: list[tuple[TemplateField, FieldSpan | None]], marked: MarkedText
) -> Iterator[tuple[int, int | None]]:
    """Starts and ends of the fields, in the order of the markers."""
    bounds: dict[str, tuple[TemplateField, tuple[int, ...]]] = {}
    for field, span in field_spans:
        if span and field.begin == field.end:
            bounds[field.begin] = field, (span.start, span.stop)
        elif span:
            bounds[field.begin], bounds[field.end] = (field, (span.start,)), (field, (span.stop,))
    for position, marker in marked.markers:
        if marker in bounds:
            field, field_edges = bounds.pop(marker)
            yield from ((edge, field.message_index) for edge in field_edges)
        else:
            yield position, None


def _span(field: TemplateField, offsets: dict[str, list[int]], text: str) -> FieldSpan | None:
    begins, ends = offsets.get(field.begin, []), offsets.get(field.end, [])
    if not begins and not ends:
        return None
    if len(begins) != len(ends) or begins[0] > ends[0]:
        raise HiddenFieldError(field.message_index)
    start, stop = begins[0], ends[0]
    if field.kind == ARGUMENT and not isinstance(field.core, str):
        return FieldSpan(start, stop, len(begins), _says(text[stop : stop + 200], field.core))
    around = stop - start if field.begin != field.end else None
    for written, before in _writings(field.core, field.offset):
        fits = around in (None, len(written)) and start >= before
        if fits and text.startswith(written, start - before):
            return FieldSpan(start - before, start - before + len(written), len(begins), True)
    if field.begin == field.end:  # its start or end may be missing
        raise HiddenFieldError(field.message_index)
    return FieldSpan(start, stop, len(begins), False)


def _writings(core: str, offset: int) -> Iterator[tuple[str, int]]:
    """A text as templates write it (verbatim, JSON), and its length before the marker."""
    yield core, offset
    for in_ascii in (False, True):
        yield (
            json.dumps(core, ensure_ascii=in_ascii)[1:-1],
            len(json.dumps(core[:offset], ensure_ascii=in_ascii)) - 2,
        )


def _says(text: str, value: Any) -> bool:
    """Whether a text contains a value as JSON or as Python writes it."""
    return json.dumps(value) in text or str(value) in text
