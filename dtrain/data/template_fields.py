"""Where every text of a conversation stands in its rendering, by offsets.

The conversation is rendered a second time with marks (private use characters) around each of its
texts. Where that rendering without its marks is the first one, the places of the marks are the
places of the texts, whatever the template does around them: no text is ever searched for, so one
that stands in the conversation twice, or in the template itself, cannot be mistaken.
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
OF_TOOLS = -1  # in place of a message's number
FIRST_MARK, LAST_MARK = 0xF0010, 0x10FFFD
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(LAST_MARK)}])")
# As JSON in ASCII writes such a character, and as Python writes it in a list.
ESCAPED = re.compile(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})|\\U00(0f|10)([0-9a-f]{4})")
THINK = re.compile(r"(\s*<think>)?(.*)(</think>)(.*)", re.DOTALL)


class Field(NamedTuple):
    """One text of a conversation.

    Attributes:
        message: its number, from 0, or OF_TOOLS.
        core: the text without blanks at its ends, which templates may strip; for an argument that
            is no text, its value.
        begin, end: its marks; the same for a single mark.
        offset: characters of `core` before a single mark.
    """

    message: int
    kind: str
    core: Any
    begin: str
    end: str
    offset: int = 0


class Place(NamedTuple):
    """Where a field stands in a rendering.

    Attributes:
        start, stop: characters from … to (excluded).
        times: how often the template writes it.
        as_written: whether the text there is the field's, as such or inside of a JSON text.
    """

    start: int
    stop: int
    times: int
    as_written: bool


class Marking:
    """A copy of a conversation with marks in its texts.

    Attributes:
        fields: all texts that are marked, in the order of the messages.
        talk: the copy.
    """

    def __init__(
        self, talk: Conversation, text: str, roles: list[str], style: Style, only: int | None = None
    ) -> None:
        """Mark a conversation.

        Args:
            talk: in the form that its template reads.
            text: its rendering.
            roles: standard role of each message.
            style: marks around each text, or a single one inside of it, which leaves its first and
                last characters to a template that looks at them.
            only: number of the only message to mark, or OF_TOOLS; None for all.
        """
        self.fields: list[Field] = []
        self._style, self._roles, self._marks = style, roles, _unused_marks(text)
        messages: Messages = [
            self._message(number, message) if only in (None, number) else message
            for number, message in enumerate(talk.messages)
        ]
        tools = talk.tools
        if tools and only in (None, OF_TOOLS):
            tools = [self._tool(tool) for tool in tools]
        self.talk = Conversation(messages, tools)

    def _message(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        if message.get("reasoning_content"):
            marked["reasoning_content"] = self._text(
                number, REASONING, message["reasoning_content"]
            )
        content, calls = message["content"], message.get("tool_calls")
        alone = not calls
        if isinstance(content, list):
            alone = alone and not any(part["text"].strip() for part in content)
            marked["content"] = [
                {**part, "text": self._text(number, CONTENT, part["text"], alone)}
                for part in content
            ]
        else:
            marked["content"] = self._content(number, content, alone)
        for kind in (INSTRUCTION, INPUT):
            if message.get(kind):
                marked[kind] = self._text(number, kind, message[kind])
        if calls:
            marked["tool_calls"] = [self._call(number, call) for call in calls]
        return marked

    def _content(self, number: int, content: str, alone: bool) -> str:
        found = THINK.fullmatch(content) if "</think>" in content else None
        if found and self._roles[number] == "assistant":
            opening, reasoning, closing, answer = found.groups(default="")
            reasoning = self._text(number, REASONING, reasoning)
            return opening + reasoning + closing + self._text(number, CONTENT, answer, alone)
        return self._text(number, CONTENT, content, alone)

    def _text(self, number: int, kind: str, text: str, even_empty: bool = False) -> str:
        core = text.strip()
        if not core:
            even_empty = even_empty and self._style == "around"
            return text + self._single(number, kind, "") if even_empty else text
        start = len(text) - len(text.lstrip())
        stop = start + len(core)
        if self._style == "inside":
            half = len(core) // 2
            middle = start + half
            return text[:middle] + self._single(number, kind, core, half) + text[middle:]
        field = Field(number, kind, core, next(self._marks), next(self._marks))
        self.fields.append(field)
        return text[:start] + field.begin + core + field.end + text[stop:]

    def _single(self, number: int, kind: str, core: Any, offset: int = 0) -> str:
        mark = next(self._marks)
        self.fields.append(Field(number, kind, core, mark, mark, offset))
        return mark

    def _call(self, number: int, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        marked = {
            **function,
            "name": self._text(number, CALL, function["name"]),
            "arguments": self._value(number, function["arguments"]),
        }
        return {**call, "function": marked}

    def _value(self, number: int, value: Any) -> Any:
        """Mark all texts in an argument; what is no text, at the end of its key."""
        if isinstance(value, str):
            return self._text(number, ARGUMENT, value)
        if isinstance(value, list):
            return [self._value(number, item) for item in value]
        if not isinstance(value, dict):
            return value
        marked = {}
        for key, inner in value.items():
            if not isinstance(inner, str | list | dict):
                key += self._single(number, ARGUMENT, inner)
            marked[key] = self._value(number, inner)
        return marked

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return tool
        return {
            **tool,
            "function": {**function, "name": self._text(OF_TOOLS, TOOLS, function["name"])},
        }


def _unused_marks(text: str) -> Iterator[str]:
    """Marks that the text does not hold."""
    used = frozenset() if text.isascii() else frozenset(MARK.findall(text))
    marks = map(chr, range(FIRST_MARK, LAST_MARK + 1))
    return (char for char in marks if char not in used) if used else marks


@dataclass(frozen=True)
class Marked:
    """A rendering with marks, taken apart.

    Attributes:
        text: without its marks.
        marks: each mark in the order of the text, with its place there.
    """

    text: str
    marks: list[tuple[int, str]]

    def on(self, text: str, fields: list[Field]) -> Marked | None:
        """The same marks on a text that differs in blanks at most; None if it differs in more.

        Such as one of which a template removes words, and the blanks that then stand at its end.
        """
        if self.text == text:
            return self
        if "".join(self.text.split()) != "".join(text.split()):
            return None
        begins = {field.begin for field in fields if field.begin != field.end}
        solid = [place for place, char in enumerate(text) if not char.isspace()] + [len(text)]
        marks, count, done = [], 0, 0
        for place, mark in self.marks:
            count += len("".join(self.text[done:place].split()))
            done = place
            at = solid[count] if mark in begins else solid[count - 1] + 1 if count else 0
            marks.append((at, mark))
        return Marked(text, marks)

    @classmethod
    def of(cls, rendering: str, fields: list[Field]) -> Marked:
        """Take a rendering apart; characters that the conversation itself holds are no marks."""
        if "\\u" in rendering or "\\U" in rendering:
            rendering = ESCAPED.sub(_unescaped, rendering)
        own = {*(field.begin for field in fields), *(field.end for field in fields)}
        runs = MARK.split(rendering)
        kept, marks, size = runs[:1], [], len(runs[0])
        for mark, run in zip(runs[1::2], runs[2::2], strict=True):
            if mark in own:
                marks.append((size, mark))
            else:
                run = mark + run
            kept.append(run)
            size += len(run)
        return cls("".join(kept), marks)


def _unescaped(found: re.Match[str]) -> str:
    high, low, plane, rest = found.groups()
    if plane:
        code = int(plane + rest, 16)
    else:
        code = 0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00
    return chr(code) if FIRST_MARK <= code <= LAST_MARK else found[0]


@dataclass(frozen=True)
class Located:
    """The fields of a conversation in its rendering.

    Attributes:
        text: the rendering.
        fields: with the place of each, None where the template leaves it out.
        edges: every place where a field begins or ends, in order, with the number of its message;
            of a field that is written twice, the second belongs to no message (None).
        marking: of the whole conversation, for more renderings.
    """

    text: str
    fields: list[tuple[Field, Place | None]]
    edges: list[tuple[int, int | None]]
    marking: Marking


class Hidden(Exception):
    """A template changes a text so that its place cannot be found."""

    def __init__(self, message: int) -> None:
        super().__init__(message)
        self.message = message


def locate(
    talk: Conversation, roles: list[str], text: str, render: Callable[[Conversation], str]
) -> Located:
    """Find all texts of a conversation in its rendering, with one more rendering if all is plain.

    Args:
        talk: in the form that the template reads.
        roles: standard role of each message.
        text: its rendering.
        render: the template.

    Raises:
        Hidden: there is a message whose marks change what the template writes elsewhere too, or
            of whose text it writes a part alone.
    """
    marking = Marking(talk, text, roles, "around")
    if (marked := _try(marking, text, render)) is not None:
        return _located(text, [(marking, marked)], marking)
    inside = Marking(talk, text, roles, "inside")
    if (marked := _try(inside, text, render)) is not None:
        return _located(text, [(inside, marked)], marking)
    single = []
    for number in range(OF_TOOLS, len(talk.messages)):  # one at a time: some text is looked at
        for style in STYLES:
            own = Marking(talk, text, roles, style, number)
            marked = _try(own, text, render) if own.fields else Marked(text, [])
            if marked is not None:
                single.append((own, marked))
                break
        else:
            raise Hidden(number)
    return _located(text, single, marking)


def _try(marking: Marking, text: str, render: Callable[[Conversation], str]) -> Marked | None:
    """A marked rendering; None where it is not the text with marks in it."""
    try:
        marked = Marked.of(render(marking.talk), marking.fields)
    except MemoryError:
        raise
    except Exception:  # a template may raise for what it finds in a text
        return None
    return marked.on(text, marking.fields)


def _located(text: str, found: list[tuple[Marking, Marked]], marking: Marking) -> Located:
    fields: list[tuple[Field, Place | None]] = []
    edges: list[tuple[int, int | None]] = []
    for own, marked in found:
        places: dict[str, list[int]] = {}
        for position, mark in marked.marks:
            places.setdefault(mark, []).append(position)
        placed = [(field, _place(field, places, text)) for field in own.fields]
        fields += placed
        edges += _edges(placed, marked)
    if len(found) > 1:
        edges.sort(key=lambda edge: edge[0])  # stable: at one place, in the order of the messages
    return Located(text, fields, edges, marking)


def _edges(
    placed: list[tuple[Field, Place | None]], marked: Marked
) -> Iterator[tuple[int, int | None]]:
    """Where the fields begin and end, in the order of the marks."""
    bounds: dict[str, tuple[Field, tuple[int, ...]]] = {}
    for field, place in placed:
        if place and field.begin == field.end:
            bounds[field.begin] = field, (place.start, place.stop)
        elif place:
            bounds[field.begin], bounds[field.end] = (field, (place.start,)), (field, (place.stop,))
    for position, mark in marked.marks:
        if mark in bounds:
            field, own = bounds.pop(mark)
            yield from ((edge, field.message) for edge in own)
        else:
            yield position, None


def _place(field: Field, places: dict[str, list[int]], text: str) -> Place | None:
    begins, ends = places.get(field.begin, []), places.get(field.end, [])
    if not begins and not ends:
        return None
    if len(begins) != len(ends) or begins[0] > ends[0]:
        raise Hidden(field.message)
    start, stop = begins[0], ends[0]
    if field.kind == ARGUMENT and not isinstance(field.core, str):
        return Place(start, stop, len(begins), _says(text[stop : stop + 200], field.core))
    around = stop - start if field.begin != field.end else None
    for written, before in _writings(field.core, field.offset):
        fits = around in (None, len(written)) and start >= before
        if fits and text.startswith(written, start - before):
            return Place(start - before, start - before + len(written), len(begins), True)
    if field.begin == field.end:  # it can have lost its head or its end
        raise Hidden(field.message)
    return Place(start, stop, len(begins), False)


def _writings(core: str, offset: int) -> Iterator[tuple[str, int]]:
    """A text as templates write it, as such or as JSON; and how much of it is before the mark."""
    yield core, offset
    for in_ascii in (False, True):
        yield (
            json.dumps(core, ensure_ascii=in_ascii)[1:-1],
            len(json.dumps(core[:offset], ensure_ascii=in_ascii)) - 2,
        )


def _says(text: str, value: Any) -> bool:
    """Whether a value that is no text stands there as JSON or Python writes it."""
    return json.dumps(value) in text or str(value) in text
