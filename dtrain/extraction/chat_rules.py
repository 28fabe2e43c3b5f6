"""Rules for good conversations and answers: `rating>=4`, `resolved`, `status=solved`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dtrain.core.errors import UserError
from dtrain.extraction.chat_fields import find

RULE = re.compile(r"\s*(!?)([^<>=!\s][^<>=!]*?)\s*(?:(>=|<=|!=|==|=|>|<)\s*(.+?)\s*)?")
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
    "=": operator.eq, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
FALSE = ("", "false", "no", "0", "none", "null", "off")


@dataclass(frozen=True)
class Rule:
    """A condition on a field.

    Attributes:
        text: as written.
        path: of the field in a conversation or a message.
        negated: the field must be absent or false.
        compare, value: of the field; without them, the field must be true.
    """

    text: str
    path: tuple[str, ...]
    negated: bool = False
    compare: str = ""
    value: str = ""

    def passes(self, field: Any) -> bool:
        """Whether a field's value fulfils the rule; None stands for a missing one."""
        if not self.compare:
            is_true = str(field).strip().lower() not in FALSE and field not in ([], {})
            return is_true != self.negated
        if field is None or isinstance(field, dict | list):
            return False
        number, limit = _number(field), _number(self.value)
        if number is not None and limit is not None:
            return COMPARE[self.compare](number, limit)
        if self.compare not in ("=", "==", "!="):
            return False
        return COMPARE[self.compare](str(field).strip().lower(), self.value.lower())


def parse_rule(text: str) -> Rule:
    """A rule of the command line.

    Raises:
        UserError: it is none.
    """
    match = RULE.fullmatch(text)
    is_order = match is not None and match[3] in (">=", "<=", ">", "<")
    if match is None or (match[1] and match[3]) or (is_order and _number(match[4]) is None):
        fix = "KEY, !KEY, KEY=VALUE, KEY!=VALUE, or KEY>=NUMBER (also <=, >, <)"
        raise UserError("is not a rule", where=f"--keep {text}", fix=fix)
    path = tuple(match[2].split("."))
    return Rule(text, path, bool(match[1]), match[3] or "", match[4] or "")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a conversation.

    Attributes:
        known: whether the field occurs in it at all.
        passes: whether the conversation, or any answer in it, passes.
        answers: for each message whether it passes; None if the field is one of the conversation.
    """

    known: bool
    passes: bool
    answers: list[bool] | None = None


def judge(rule: Rule, conversation: Any, messages: list[Any], is_answer: list[bool]) -> Verdict:
    """Apply a rule to the conversation's field, or to that of its messages.

    A field of answers judges each answer. A field of other messages alone, such as a rating that
    the customer sends, judges the conversation.
    """
    field = find(conversation, rule.path)
    if field is not None:
        return Verdict(True, rule.passes(field))
    fields = [find(message, rule.path) for message in messages]
    if any(f is not None and answers for f, answers in zip(fields, is_answer, strict=True)):
        good = [rule.passes(f) for f in fields]
        passes = any(g and answers for g, answers in zip(good, is_answer, strict=True))
        return Verdict(True, passes, good)
    value = next((f for f in reversed(fields) if f is not None), None)
    return Verdict(value is not None, rule.passes(value))
