"""A conversation rendered by a chat template, and checks that all of it is in the text.

A chat template is a program that may leave out what it does not know: reasoning, tool calls,
roles, whole turns. Omissions are errors, except the reasoning of earlier answers, which templates
leave out on purpose.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache

from dtrain.core.errors import UserError
from dtrain.data.chat_templates import INTERNAL_KEYS, ChatTemplate, Span
from dtrain.data.conversations import EMPTY_VALUES, Conversation
from dtrain.data.template_fields import (
    ARGUMENT,
    CALL,
    CONTENT,
    INPUT,
    INSTRUCTION,
    REASONING,
    TOOLS,
    TOOLS_INDEX,
    FieldSpan,
    HiddenFieldError,
    LocatedFields,
    TemplateField,
    locate_fields,
)

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEMBERED = 4096  # cached questions about a template

# Prefixes of what is counted, in rows.
AS_ROLE = "role "  # then the role, and how it is treated
UNREAD = "message key "  # then a key that neither dtrain nor the template reads

STANDARD_ROLES = ("system", "user", "assistant", "tool")
READ_KEYS = frozenset(
    ("role", "content", "reasoning_content", "tool_calls", "instruction", "input")
)
CALLS = "a tool call in"
NO_CONTENT = frozenset(("id", "name", "tool_call_id"))  # these keys only name the message


class RenderedConversation:
    """A conversation, its rendering, and where each of its texts is in it.

    Attributes:
        template: the chat template.
        conversation: adapted to what the template reads.
        messages: of the conversation.
        roles: standard role of each message.
        text: the rendering.
        generated: what the template marks with `{% generation %}`; None if it marks nothing.
        located: the spans of all texts in the rendering.
    """

    def __init__(
        self, template: ChatTemplate, rendered: Conversation, conversation: Conversation
    ) -> None:
        self.template, self.conversation = template, template.adapt(rendered)
        self.messages = conversation.messages
        self.roles = [message["role"] for message in conversation.messages]
        self.generated: list[Span] | None = None
        if "generation" in template.text and GENERATION.search(template.text):
            text, self.generated = template.render_with_spans(self.conversation)
        else:
            text = template.render(self.conversation)
        try:
            self.located: LocatedFields = locate_fields(
                self.conversation, self.roles, text, template.render
            )
        except HiddenFieldError as hidden:
            raise self.changed_error(hidden.message_index) from hidden
        self.text = text

    def ignored(self) -> set[str]:
        """Notes on unknown roles, and on keys that neither dtrain nor the template reads."""
        notes = {
            f"{AS_ROLE}`{role}` is not standard: rendered as written, without loss"
            for role in self.roles
            if role not in STANDARD_ROLES
        }
        for message in self.messages:
            for key in message.keys() - READ_KEYS - NO_CONTENT - INTERNAL_KEYS:
                if message[key] not in EMPTY_VALUES and not _reads(self.template.text, key):
                    notes.add(f"{UNREAD}`{key}` is not read")
        return notes

    def check_complete(self) -> None:
        """Raise UserError if the template leaves out a text, a tool call or the tools."""
        if all(_is_written(field, span) for field, span in self.located.fields):
            return
        for kinds in ((CONTENT, INSTRUCTION, INPUT), (CALL, ARGUMENT), (TOOLS,)):
            for field, span in self.located.fields:
                if field.kind in kinds and not _is_written(field, span):
                    # `content` is the same text as `instruction` and `input` together.
                    same = (INSTRUCTION, INPUT) if field.kind == CONTENT else (CONTENT,)
                    if kinds[0] == CONTENT and self._has(field.message_index, *same):
                        continue
                    raise self._left_out(field)

    def _has(self, index: int, *kinds: str) -> bool:
        written = [
            _is_written(field, span)
            for field, span in self.located.fields
            if field.message_index == index and field.kind in kinds
        ]
        return bool(written) and all(written)

    def _left_out(self, field: TemplateField) -> UserError:
        fix = "choose a `template` that writes it, or change the row"
        if field.message_index == TOOLS_INDEX:
            return UserError("the chat template leaves out the row's tools", fix=fix)
        message = self.messages[field.message_index]
        role = message.get("written_role", message["role"])
        texts = {REASONING: "the reasoning of", CALL: CALLS, ARGUMENT: CALLS}
        text = texts.get(field.kind, "the text of")
        owner = f"message {field.message_index + 1} (role `{role}`)"
        return UserError(f"the chat template leaves out {text} {owner}", fix=fix)

    def check_reasoning(self, trained: Container[int]) -> int:
        """Count the answers whose reasoning is left out; the last answer must keep its reasoning.

        Args:
            trained: indices of the messages with loss.

        Raises:
            UserError: the reasoning of the last answer, or of another role, is left out.
        """
        fields = [f for f, span in self.located.fields if f.kind == REASONING and span is None]
        left_out = [field.message_index for field in fields]
        if stray := [f for f in fields if self.roles[f.message_index] != "assistant"]:
            raise self._left_out(stray[0])
        answers = [index for index, role in enumerate(self.roles) if role == "assistant"]
        if answers and answers[-1] in left_out and answers[-1] in trained:
            raise UserError(
                f"the chat template leaves out the reasoning of the last answer, "
                f"message {answers[-1] + 1}",
                fix="choose a `template` that writes reasoning, or remove it from the row",
            )
        return len(set(left_out))

    def check_unchanged(self, index: int) -> None:
        """Raise UserError if the template rewrites an answer, or writes it twice."""
        if self.roles[index] != "assistant":
            return
        for field, span in self.located.fields:
            is_answer = field.message_index == index and field.kind in (CONTENT, REASONING)
            if is_answer and span and not (span.as_written and span.times == 1):
                raise self.changed_error(index)

    def changed_error(self, index: int) -> UserError:
        """The error for a message (or TOOLS_INDEX) that the template rewrites."""
        if index == TOOLS_INDEX:
            message = "the chat template changes the row's tools, so they cannot be checked"
            return UserError(message, fix="choose another `template`")
        text = "answer" if self.roles[index] == "assistant" else "text"
        return UserError(
            f"the chat template changes the {text} in message {index + 1}, so it cannot be "
            "distinguished from the prompt",
            fix="choose another `template`, or `train_on: last`",
        )


@lru_cache(maxsize=REMEMBERED)
def _reads(template: str, key: str) -> bool:
    """Whether a template appears to read a key of a message: `.key`, or the key in quotes."""
    name = re.escape(key)
    return re.search(rf"\.{name}\b|['\"]{name}['\"]", template) is not None


def _is_written(field: TemplateField, span: FieldSpan | None) -> bool:
    """Whether the template writes a field; a value that is not a text must be after its key."""
    return span is not None and (isinstance(field.core, str) or span.as_written)
