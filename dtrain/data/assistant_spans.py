"""Which characters of a rendered conversation have loss: every answer, up to the end of its turn.

Few templates mark their answers with `{% generation %}`, so the start of an answer is found from
the generation prompt, and its end from what closes a turn; generation marks are checked against
these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from dtrain.core.errors import UserError
from dtrain.data.chat_templates import (
    RENDER_SECONDS,
    ChatTemplate,
    LimitExceeded,
    Span,
    resource_limits,
)
from dtrain.data.conversations import Conversation, Messages
from dtrain.data.end_of_turn import ANSWER, common_prefix_length, endings
from dtrain.data.rendered_conversation import AS_ROLE, REMEMBERED, RenderedConversation
from dtrain.data.template_fields import TOOLS_INDEX, MarkedText

REASON_CHARACTERS = 300  # of a template's own error message

ROLES = {"all": "assistant", "last": "assistant"}  # other entries of `train_on` are roles

# What is counted, in answers.
NO_REASONING = "reasoning_left_out"
NO_END = "answers_without_end"


def render_answers(
    template: ChatTemplate,
    conversation: Conversation,
    where: str,
    train_on: str = "all",
    counts: Counter[str] | None = None,
) -> tuple[str, list[Span]]:
    """Render a conversation, and find the spans that have loss, ends of turn included.

    Args:
        template: of `resolve_template`.
        conversation: messages and tools.
        where: file and line, for messages.
        train_on: of the recipe; `last` is the last answer, if the conversation ends with one; ""
            for no loss.
        counts: incremented for NO_REASONING, NO_END, and roles that are treated as others.

    Returns:
        The text, and (start, stop) character offsets in ascending order.

    Raises:
        UserError: the template refuses the conversation, leaves out some of it, changes its
            answers, or marks only a part of them.
    """
    try:
        with resource_limits(RENDER_SECONDS):
            return _render(
                template, conversation, train_on, Counter() if counts is None else counts
            )
    except UserError as error:
        raise UserError(error.message, where=where, fix=error.fix) from error
    except (Exception, LimitExceeded) as error:  # a template is a program: it can raise anything
        raise UserError(
            f"the chat template refuses this conversation: {_reason(error)}",
            where=where,
            fix="correct the row, or choose another `template`",
        ) from error


def _reason(error: BaseException) -> str:
    """The template's error message, shortened: it may contain the whole conversation."""
    text = str(error) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else text[:REASON_CHARACTERS] + " …"


def _render(
    template: ChatTemplate, conversation: Conversation, train_on: str, counts: Counter[str]
) -> tuple[str, list[Span]]:
    """Render with the roles of the row if the template knows them, else with standard roles."""
    written = {m["written_role"]: m["role"] for m in conversation.messages if "written_role" in m}
    if written and any(
        f"{quote}{role}{quote}" in template.text for role in written for quote in "'\""
    ):
        messages = [{**m, "role": m.get("written_role", m["role"])} for m in conversation.messages]
        as_written = replace(conversation, messages=messages)
        try:
            return _AnswerSpans(template, as_written, conversation).find(train_on, counts)
        except Exception:  # the template may contain the name of the role with another meaning
            pass
    result = _AnswerSpans(template, conversation, conversation).find(train_on, counts)
    for written_role, role in written.items():
        counts[f"{AS_ROLE}`{written_role}` read as `{role}`"] += 1
    return result


@dataclass(frozen=True)
class _Turn:
    """The position of a message in the text, in characters.

    Attributes:
        first, last: start of its first text, and end of its last.
        before, after: end of the text before it, and start of the text after it.
        previous: index of the message before it in the text.
    """

    first: int
    last: int
    before: int
    after: int
    previous: int | None


class _AnswerSpans(RenderedConversation):
    """Finds the spans with loss in a rendered conversation."""

    def find(self, train_on: str, counts: Counter[str]) -> tuple[str, list[Span]]:
        """The text, and the spans that have loss."""
        trained = self._trained_messages(train_on)
        self.check_complete()
        left_out = self.check_reasoning(trained if train_on else range(len(self.roles)))
        counts.update(self.ignored())
        bounds = self._bounds()
        spans: list[Span] = []
        open_ended = 0
        for index in trained:
            if index in bounds:  # the template leaves out empty turns
                self.check_unchanged(index)
                message_spans, closed = self._spans(index, self._turn(index, *bounds[index]))
                spans += message_spans
                open_ended += not closed
        counts[NO_REASONING] += left_out
        counts[NO_END] += open_ended
        return self.text, sorted(spans)

    def _trained_messages(self, train_on: str) -> list[int]:
        """Indices of the messages with loss: those of `train_on`, unless the row differs."""
        roles, last = _roles_of(train_on), len(self.messages) - 1
        trained = []
        for index, message in enumerate(self.messages):
            has_loss = message["role"] in roles and (train_on != "last" or index == last)
            if "train" in message and train_on:
                asked = message["train"] and message["role"] != "assistant"
                has_loss = bool(asked or (has_loss and message["train"]))
            if has_loss:
                trained.append(index)
        return trained

    def _bounds(self) -> dict[int, list[int]]:
        """Index of each message with a text → its first and last index in `located.edges`."""
        bounds: dict[int, list[int]] = {}
        for edge, (_, message) in enumerate(self.located.edges):
            if message is not None:
                bounds.setdefault(message, [edge, edge])[1] = edge
        return bounds

    def _turn(self, index: int, low: int, high: int) -> _Turn:
        edges = self.located.edges
        if any(owner not in (index, None) for _, owner in edges[low : high + 1]):
            raise self.changed_error(index)
        before, previous = edges[low - 1] if low else (0, None)
        after = edges[high + 1][0] if high + 1 < len(edges) else len(self.text)
        return _Turn(edges[low][0], edges[high][0], before, after, previous)

    def _spans(self, index: int, turn: _Turn) -> tuple[list[Span], bool]:
        """The spans of a message that have loss, and whether its end of turn has loss."""
        if self.roles[index] != "assistant":
            return [self._other_role(turn)], True
        if self.generated is None:
            start = turn.before + self._header(index, turn)
            end, closed = self._end(index, turn)
            return [(start, end)], closed
        return self._generated(index, turn)

    def _other_role(self, turn: _Turn) -> Span:
        """A turn of a user or a tool, with its end if it ends as an answer does."""
        rest, ending = self.text[turn.last : turn.after], (endings(self.template) or ("",))[0]
        blanks, separator, _ = rest.partition(ending) if ending else ("", "", "")
        closed = bool(separator) and not blanks.strip()
        return turn.first, turn.last + closed * (len(blanks) + len(ending))

    def _header(self, index: int, turn: _Turn) -> int:
        """Length of the header before an answer, which the model does not generate."""
        gap = self.text[turn.before : turn.first]
        calls = bool(self.messages[index].get("tool_calls"))
        previous = turn.previous is not None and turn.previous != TOOLS_INDEX
        role = self.roles[turn.previous] if previous else None  # type: ignore[index]
        key = "header", gap, role, calls, not index
        return self._cached(key, lambda: self._find_header(index, gap, turn.before))

    def _find_header(self, index: int, gap: str, before: int) -> int:
        if index:  # few templates render an empty prompt
            prompt = self._after(before, index, prompt=True)
            if prompt is not None and gap.startswith(prompt):
                return len(prompt)
        # The generation prompt differs from this header: render a plain answer and compare.
        plain = {"role": self.conversation.messages[index]["role"], "content": f"{ANSWER}a"}
        if isinstance(self.conversation.messages[index]["content"], list):
            plain["content"] = [{"type": "text", "text": f"{ANSWER}a"}]
        messages = [*self.located.marking.conversation.messages[:index], plain]
        rendering = self._rendering(messages) or ""
        return common_prefix_length(gap, self._after_markers(rendering.partition(ANSWER)[0]))

    def _end(self, index: int, turn: _Turn) -> tuple[int, bool]:
        """Where an answer ends, and whether something closes its turn."""
        rest, is_last = self.text[turn.last : turn.after], turn.after == len(self.text)
        known = endings(self.template)
        matches = [
            (at, ending) for ending in known or () if ending and (at := rest.find(ending)) >= 0
        ]
        if matches:
            offset, ending = min(matches)  # of two at the same offset, the shorter one
            return turn.last + offset + len(ending), True
        if is_last:  # such as a tool call, which some templates close in another way
            size = len(rest.rstrip())
        else:
            key = "end", rest, self.roles[index], bool(self.messages[index].get("tool_calls"))
            size = self._cached(key, lambda: self._find_end(index, rest, turn.last))
        return turn.last + size, bool(size) and known != ("", "")

    def _find_end(self, index: int, rest: str, last: int) -> int:
        """Length of what the template writes after an answer, whatever follows."""
        closing = (self._after(last, index + 1) or "").rstrip()
        return len(closing) if rest.startswith(closing) else 0

    def _cached(self, key: tuple[object, ...], find: Callable[[], int]) -> int:
        cache = self.template.cache
        if key not in cache:
            if len(cache) >= REMEMBERED:
                cache.clear()
            cache[key] = find()
        result: int = cache[key]
        return result

    def _after(self, stop: int, count: int, *, prompt: bool = False) -> str | None:
        """What the template writes after the last text of the first messages.

        Args:
            stop: offset of the end of that text in the whole conversation.
            count: number of messages.
            prompt: with the generation prompt.

        Returns:
            None if the template refuses these messages alone.
        """
        rendering = self._rendering(self.conversation.messages[:count], prompt=prompt)
        if rendering is None or rendering.startswith(self.text[:stop]):
            return rendering and rendering[stop:]
        # Earlier text depends on what follows, such as reasoning: find the text by markers.
        marked = self._rendering(self.located.marking.conversation.messages[:count], prompt=prompt)
        return marked and self._after_markers(marked)

    def _after_markers(self, rendering: str) -> str:
        marked = MarkedText.of(rendering, self.located.marking.fields)
        return marked.text[marked.markers[-1][0] if marked.markers else 0 :]

    def _rendering(self, messages: Messages, *, prompt: bool = False) -> str | None:
        try:
            return self.template.render(
                Conversation(messages, self.conversation.tools), prompt=prompt
            )
        except MemoryError:
            raise
        except Exception:  # a template may refuse an incomplete conversation
            return None

    def _generated(self, index: int, turn: _Turn) -> tuple[list[Span], bool]:
        """The generation marks in an answer; they must contain all of it and its end."""
        spans = [
            (max(start, turn.before), min(stop, turn.after))
            for start, stop in self.generated or []
            if start < turn.after and stop > turn.before
        ]
        inner = [
            (span.start, span.stop)
            for field, span in self.located.fields
            if field.message_index == index and span
        ]
        end, closed = self._end(index, turn)
        inner.append((turn.last, end))
        for start, stop in inner:
            if not any(low <= start and stop <= high for low, high in spans):
                missing = self.text[start:stop][:80]
                raise UserError(
                    f"the template's {{% generation %}} marks leave out {missing!r} of the answer "
                    f"in message {index + 1}",
                    fix="mark all of each answer, and what closes its turn",
                )
        return spans, closed


@lru_cache(maxsize=8)
def _roles_of(train_on: str) -> frozenset[str]:
    """The roles in `train_on`."""
    return frozenset(ROLES.get(name, name) for name in train_on.split("+"))
