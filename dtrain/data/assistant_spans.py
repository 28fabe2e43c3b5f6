"""The check of a rendered conversation: all of it is there, and each answer is learned to its end.

A chat template is a program that may leave out what it does not know: reasoning, calls of tools,
roles, whole turns. What it leaves out is refused with its row, or counted where templates mean it
(the reasoning of earlier answers). Few templates mark their answers with `{% generation %}`, so
where an answer begins is found from the prompt for it, and where it ends from what closes a turn;
those that do are held to the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import lru_cache

from dtrain.core.errors import UserError
from dtrain.data.chat_templates import OWN_KEYS, SECONDS, ChatTemplate, Span
from dtrain.data.conversations import Conversation, Messages
from dtrain.data.end_of_turn import ANSWER, common_prefix_length, endings
from dtrain.data.sandbox import LimitExceeded, resource_limits
from dtrain.data.template_fields import (
    ARGUMENT,
    CALL,
    CONTENT,
    INPUT,
    INSTRUCTION,
    OF_TOOLS,
    REASONING,
    TOOLS,
    Field,
    Hidden,
    Located,
    Marked,
    Place,
    locate,
)

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASON_CHARACTERS = 300  # of what a template says when it refuses a conversation
REMEMBERED = 4096  # ways in which turns of a template begin and end

ROLES = {"all": "assistant", "last": "assistant"}  # else a part of `train_on` is the role itself

# What is counted, in rows or in answers.
NO_REASONING = "reasoning_left_out"  # answers
NO_END = "answers_without_end"
AS_ROLE = "role "  # and the role, then the one that it is read as: rows
UNREAD = "message key "  # and the key, which neither this program nor the template reads: rows

STANDARD_ROLES = ("system", "user", "assistant", "tool")
READ_KEYS = frozenset(
    ("role", "content", "reasoning_content", "tool_calls", "instruction", "input")
)
CALLS = "a call of a tool in"
NO_CONTENT = frozenset(("id", "name", "tool_call_id"))  # such keys only name the message


def render_answers(
    template: ChatTemplate,
    talk: Conversation,
    where: str,
    train_on: str = "all",
    counts: Counter[str] | None = None,
) -> tuple[str, list[Span]]:
    """A conversation as text, with the spans of what is learned, ends of turn included.

    Args:
        template: of `resolve_template`.
        talk: messages and tools.
        where: file and line, for the message.
        train_on: of the recipe; `last` is the last answer, if the conversation ends with one; ""
            for nothing.
        counts: counts NO_REASONING, NO_END, and roles that are read as others.

    Raises:
        UserError: the template refuses the conversation, leaves out some of it, changes its
            answers, or marks them in part.
    """
    try:
        with resource_limits(SECONDS):
            return _as_known(template, talk, train_on, Counter() if counts is None else counts)
    except UserError as error:
        raise UserError(error.message, where=where, fix=error.fix) from error
    except (Exception, LimitExceeded) as error:  # a template is a program: it can raise anything
        raise UserError(
            f"the chat template refuses this conversation: {_reason(error)}",
            where=where,
            fix="correct the row, or choose another `template`",
        ) from error


def _reason(error: BaseException) -> str:
    """What a template says, which may be the whole conversation."""
    text = str(error) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else text[:REASON_CHARACTERS] + " …"


def _as_known(
    template: ChatTemplate, talk: Conversation, train_on: str, counts: Counter[str]
) -> tuple[str, list[Span]]:
    """Render with the row's own names of roles if the template has them, else the standard ones."""
    written = {m["written_role"]: m["role"] for m in talk.messages if "written_role" in m}
    if written and any(
        f"{quote}{role}{quote}" in template.text for role in written for quote in "'\""
    ):
        own = [{**m, "role": m.get("written_role", m["role"])} for m in talk.messages]
        try:
            return _Check(template, replace(talk, messages=own), talk).run(train_on, counts)
        except Exception:  # such a name may stand in it as another word
            pass
    found = _Check(template, talk, talk).run(train_on, counts)
    for own, role in written.items():
        counts[f"{AS_ROLE}`{own}` read as `{role}`"] += 1
    return found


@dataclass(frozen=True)
class _Turn:
    """Where a message stands.

    Attributes:
        first, last: from its first text to its last.
        before, after: where the texts around it end and begin.
        previous: number of the message before it in the text.
    """

    first: int
    last: int
    before: int
    after: int
    previous: int | None


class _Check:
    """One conversation under its template."""

    def __init__(self, template: ChatTemplate, rendered: Conversation, talk: Conversation) -> None:
        self.template, self.talk = template, template.shaped(rendered)
        self.messages = talk.messages
        self.roles = [message["role"] for message in talk.messages]
        self.generated: list[Span] | None = None
        if "generation" in template.text and GENERATION.search(template.text):
            text, self.generated = template.render_marked(self.talk)
        else:
            text = template.render(self.talk)
        try:
            self.located: Located = locate(self.talk, self.roles, text, template.render)
        except Hidden as hidden:
            raise self._changed(hidden.message) from hidden
        self.text = text

    def run(self, train_on: str, counts: Counter[str]) -> tuple[str, list[Span]]:
        """The text, and the spans of what is learned."""
        learned = self._learned(train_on)
        self._check_all_is_there()
        left_out = self._check_reasoning(learned if train_on else range(len(self.roles)))
        counts.update(self._oddities())
        bounds = self._bounds()
        spans: list[Span] = []
        open_ended = 0
        for number in learned:
            if number in bounds:  # else an empty turn that the template writes nothing of
                self._check_as_written(number)
                own, closed = self._spans(number, self._turn(number, *bounds[number]))
                spans += own
                open_ended += not closed
        counts[NO_REASONING] += left_out
        counts[NO_END] += open_ended
        return self.text, sorted(spans)

    def _learned(self, train_on: str) -> list[int]:
        """Numbers of the messages to learn: those of `train_on`, unless the row says otherwise."""
        roles, last = _roles_of(train_on), len(self.messages) - 1
        learned = []
        for number, message in enumerate(self.messages):
            chosen = message["role"] in roles and (train_on != "last" or number == last)
            if "train" in message and train_on:
                asked = message["train"] and message["role"] != "assistant"
                chosen = bool(asked or (chosen and message["train"]))
            if chosen:
                learned.append(number)
        return learned

    def _oddities(self) -> set[str]:
        """Roles that are written and mean nothing to dtrain, and keys that nobody reads."""
        odd = {
            f"{AS_ROLE}`{role}` is no standard one: written as it is, and no answer"
            for role in self.roles
            if role not in STANDARD_ROLES
        }
        for message in self.messages:
            for key in message.keys() - READ_KEYS - NO_CONTENT - OWN_KEYS:
                if message[key] not in (None, "", [], {}) and not _reads(self.template.text, key):
                    odd.add(f"{UNREAD}`{key}` is not read")
        return odd

    def _check_all_is_there(self) -> None:
        if all(_is_there(field, place) for field, place in self.located.fields):
            return
        for kinds in ((CONTENT, INSTRUCTION, INPUT), (CALL, ARGUMENT), (TOOLS,)):
            for field, place in self.located.fields:
                if field.kind in kinds and not _is_there(field, place):
                    if field.kind == CONTENT and self._has_instruction(field.message):
                        continue
                    if field.kind in (INSTRUCTION, INPUT) and self._has_content(field.message):
                        continue
                    raise self._left_out(field)

    def _has(self, number: int, *kinds: str) -> bool:
        own = [(f, p) for f, p in self.located.fields if f.message == number and f.kind in kinds]
        return bool(own) and all(_is_there(field, place) for field, place in own)

    def _has_content(self, number: int) -> bool:
        return self._has(number, CONTENT)

    def _has_instruction(self, number: int) -> bool:
        """Whether instruction and input are there, which are the same text taken apart."""
        return self._has(number, INSTRUCTION, INPUT)

    def _left_out(self, field: Field) -> UserError:
        fix = "choose a `template` that writes it, or change the row"
        if field.message == OF_TOOLS:
            return UserError("the chat template leaves out the row's tools", fix=fix)
        message = self.messages[field.message]
        role = message.get("written_role", message["role"])
        what = {REASONING: "the reasoning of", CALL: CALLS, ARGUMENT: CALLS}.get(
            field.kind, "the text of"
        )
        whose = f"message {field.message + 1} (role `{role}`)"
        return UserError(f"the chat template leaves out {what} {whose}", fix=fix)

    def _check_reasoning(self, learned: Container[int]) -> int:
        """Reasoning that is left out of earlier answers; the last one must keep its own."""
        fields = [f for f, p in self.located.fields if f.kind == REASONING and p is None]
        left_out = [field.message for field in fields]
        if stray := [f for f in fields if self.roles[f.message] != "assistant"]:
            raise self._left_out(stray[0])
        answers = [number for number, role in enumerate(self.roles) if role == "assistant"]
        if answers and answers[-1] in left_out and answers[-1] in learned:
            raise UserError(
                f"the chat template leaves out the reasoning of the last answer, "
                f"message {answers[-1] + 1}",
                fix="choose a `template` that writes reasoning, or remove it from the row",
            )
        return len(set(left_out))

    def _check_as_written(self, number: int) -> None:
        """Refuse an answer that the template rewrites, or writes twice."""
        if self.roles[number] != "assistant":
            return
        for field, place in self.located.fields:
            said = field.message == number and field.kind in (CONTENT, REASONING)
            if said and place and not (place.as_written and place.times == 1):
                raise self._changed(number)

    def _changed(self, number: int) -> UserError:
        if number == OF_TOOLS:
            what = "the chat template changes the row's tools, so they cannot be found in its text"
            return UserError(what, fix="choose another `template`")
        whose = "answer" if self.roles[number] == "assistant" else "text"
        return UserError(
            f"the chat template changes the {whose} in message {number + 1}, so it cannot be "
            "distinguished from the prompt",
            fix="choose another `template`, or `train_on: last`",
        )

    def _bounds(self) -> dict[int, list[int]]:
        """Of each message that has a text, the first and the last of its edges."""
        bounds: dict[int, list[int]] = {}
        for index, (_, number) in enumerate(self.located.edges):
            if number is not None:
                bounds.setdefault(number, [index, index])[1] = index
        return bounds

    def _turn(self, number: int, low: int, high: int) -> _Turn:
        edges = self.located.edges
        if any(owner not in (number, None) for _, owner in edges[low : high + 1]):
            raise self._changed(number)
        before, previous = edges[low - 1] if low else (0, None)
        after = edges[high + 1][0] if high + 1 < len(edges) else len(self.text)
        return _Turn(edges[low][0], edges[high][0], before, after, previous)

    def _spans(self, number: int, turn: _Turn) -> tuple[list[Span], bool]:
        """What is learned of a message, and whether its end is."""
        if self.roles[number] != "assistant":
            return [self._said(turn)], True
        if self.generated is None:
            start = turn.before + self._header(number, turn)
            end, closed = self._end(number, turn)
            return [(start, end)], closed
        return self._generated(number, turn)

    def _said(self, turn: _Turn) -> Span:
        """What a user or a tool says, and the end of the turn where it ends as an answer does."""
        rest, ending = self.text[turn.last : turn.after], (endings(self.template) or ("",))[0]
        blanks, found, _ = rest.partition(ending) if ending else ("", "", "")
        closed = bool(found) and not blanks.strip()
        return turn.first, turn.last + closed * (len(blanks) + len(ending))

    def _header(self, number: int, turn: _Turn) -> int:
        """Characters between the text before an answer and what the model itself must write."""
        gap = self.text[turn.before : turn.first]
        calls = bool(self.messages[number].get("tool_calls"))
        previous = turn.previous is not None and turn.previous != OF_TOOLS
        role = self.roles[turn.previous] if previous else None  # type: ignore[index]
        key = "header", gap, role, calls, not number
        return self._remembered(key, lambda: self._find_header(number, gap, turn.before))

    def _find_header(self, number: int, gap: str, before: int) -> int:
        if number:  # few templates render a prompt from nothing
            prompt = self._behind(before, number, prompt=True)
            if prompt is not None and gap.startswith(prompt):
                return len(prompt)
        # The template writes something else behind a prompt than here: a plain answer shows what
        # stands before any answer.
        plain = {"role": self.talk.messages[number]["role"], "content": f"{ANSWER}a"}
        if isinstance(self.talk.messages[number]["content"], list):
            plain["content"] = [{"type": "text", "text": f"{ANSWER}a"}]
        messages = [*self.located.marking.talk.messages[:number], plain]
        rendering = self._rendering(messages) or ""
        return common_prefix_length(gap, self._behind_marks(rendering.partition(ANSWER)[0]))

    def _end(self, number: int, turn: _Turn) -> tuple[int, bool]:
        """Where an answer ends, and whether with something that closes its turn."""
        rest, is_last = self.text[turn.last : turn.after], turn.after == len(self.text)
        known = endings(self.template)
        found = [
            (at, ending) for ending in known or () if ending and (at := rest.find(ending)) >= 0
        ]
        if found:
            place, ending = min(found)  # the shorter one of two at one place
            return turn.last + place + len(ending), True
        if is_last:  # such as a call, which some templates close in another way
            size = len(rest.rstrip())
        else:
            key = "end", rest, self.roles[number], bool(self.messages[number].get("tool_calls"))
            size = self._remembered(key, lambda: self._find_end(number, rest, turn.last))
        return turn.last + size, bool(size) and known != ("", "")

    def _find_end(self, number: int, rest: str, last: int) -> int:
        """Characters behind an answer that the template writes before it knows what follows."""
        closing = (self._behind(last, number + 1) or "").rstrip()
        return len(closing) if rest.startswith(closing) else 0

    def _remembered(self, key: tuple[object, ...], find: Callable[[], int]) -> int:
        memory = self.template.memory
        if key not in memory:
            if len(memory) >= REMEMBERED:
                memory.clear()
            memory[key] = find()
        found: int = memory[key]
        return found

    def _behind(self, place: int, count: int, *, prompt: bool = False) -> str | None:
        """What the template writes behind the last text of the first messages, if it takes them.

        Args:
            place: where that text ends in the whole conversation.
            count: of the messages.
            prompt: write what stands before the next answer too.
        """
        rendering = self._rendering(self.talk.messages[:count], prompt=prompt)
        if rendering is None or rendering.startswith(self.text[:place]):
            return rendering and rendering[place:]
        # What stands before it depends on what follows, such as reasoning: find the text by marks.
        marked = self._rendering(self.located.marking.talk.messages[:count], prompt=prompt)
        return marked and self._behind_marks(marked)

    def _behind_marks(self, rendering: str) -> str:
        marked = Marked.of(rendering, self.located.marking.fields)
        return marked.text[marked.marks[-1][0] if marked.marks else 0 :]

    def _rendering(self, messages: Messages, *, prompt: bool = False) -> str | None:
        try:
            return self.template.render(Conversation(messages, self.talk.tools), prompt=prompt)
        except MemoryError:
            raise
        except Exception:  # a template may refuse half a conversation
            return None

    def _generated(self, number: int, turn: _Turn) -> tuple[list[Span], bool]:
        """What the template marks of an answer: all of it, and its end."""
        spans = [
            (max(start, turn.before), min(stop, turn.after))
            for start, stop in self.generated or []
            if start < turn.after and stop > turn.before
        ]
        inner = [
            (place.start, place.stop)
            for field, place in self.located.fields
            if field.message == number and place
        ]
        end, closed = self._end(number, turn)
        inner.append((turn.last, end))
        for start, stop in inner:
            if not any(low <= start and stop <= high for low, high in spans):
                missed = self.text[start:stop][:80]
                raise UserError(
                    f"the template's {{% generation %}} marks leave out {missed!r} of the answer "
                    f"in message {number + 1}",
                    fix="put all of each answer, and what closes its turn, between the marks",
                )
        return spans, closed


@lru_cache(maxsize=8)
def _roles_of(train_on: str) -> frozenset[str]:
    """Standard roles of the messages that a recipe's `train_on` names."""
    return frozenset(ROLES.get(part, part) for part in train_on.split("+"))


@lru_cache(maxsize=REMEMBERED)
def _reads(template: str, key: str) -> bool:
    """Whether a template seems to read a key of a message: `.key`, or the key in quotes."""
    name = re.escape(key)
    return re.search(rf"\.{name}\b|['\"]{name}['\"]", template) is not None


def _is_there(field: Field, place: Place | None) -> bool:
    """Whether the template writes a field; a value that is no text, behind its key."""
    return place is not None and (isinstance(field.core, str) or place.as_written)
