"""Rows from exports of conversations, such as those of a support desk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from dtrain.core.errors import UserError
from dtrain.extraction.chat_fields import (
    SAMPLE_ROWS,
    ChatFields,
    detect_fields,
    find,
    message_text,
    normalized,
)
from dtrain.extraction.chat_rules import Rule, judge
from dtrain.extraction.text_files import TASK, ExtractedRow

SKIP = "skip"
INTERNAL = ("private", "internal", "isprivate", "isinternal", "internalnote", "hidden", "isnote")
Turn = dict[str, Any]


@dataclass
class ChatExtractor:
    """Makes rows of conversations.

    Attributes:
        roles: normalized role of an export → user, assistant, system or skip.
        rules: what good conversations and answers fulfil.
        min_turns: least number of answers of a conversation.
        left_out: counts what makes no row, by reason.
        seen_roles: messages by (role of the export, role of the row).
        unknown_roles: messages by role, of roles that `roles` lacks.
        rules_seen: rules whose field occurred.
    """

    roles: Mapping[str, str]
    rules: list[Rule]
    min_turns: int
    left_out: Counter[str]
    seen_roles: Counter[tuple[str, str]] = field(default_factory=Counter)
    unknown_roles: Counter[str] = field(default_factory=Counter)
    rules_seen: set[str] = field(default_factory=set)

    def extract(
        self, rows: Iterable[tuple[str, Any]], file: str
    ) -> tuple[ChatFields | None, Iterator[ExtractedRow]]:
        """Rows of a file.

        Args:
            rows: the location of each row, and its value or a UserError.
            file: its name, for messages.

        Returns:
            The keys that were found, and the rows.

        Raises:
            UserError: the rows hold no messages.
        """
        usable = self._usable(rows)
        first = list(islice(usable, SAMPLE_ROWS))
        if not first:
            return None, iter(())
        fields = detect_fields([value for _, value in first], self.roles, file)
        rows = chain(first, usable)
        conversations = (
            ((where, row, _messages(row, fields)) for where, row in rows)
            if fields.messages is not None
            else _grouped(rows, fields, file)
        )
        return fields, self._rows(conversations, fields)

    def _usable(self, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        for where, value in rows:
            if isinstance(value, UserError):
                self.left_out[f"rows that cannot be read ({value.message.split(':')[0]})"] += 1
            elif isinstance(value, dict | list):
                yield where, value
            else:
                self.left_out["rows that are no objects"] += 1

    def _rows(
        self, conversations: Iterable[tuple[str, Any, list[Any]]], fields: ChatFields
    ) -> Iterator[ExtractedRow]:
        for where, row, messages in conversations:
            turns, reason = self._turns(row, messages, fields)
            identity = find(row, fields.identity) if fields.identity else None
            name = f"{where} {fields.identity[-1]}={identity}" if fields.identity else where
            if reason:
                self.left_out[f"conversations {reason}"] += 1
            else:
                document = f"{identity}" if identity is not None else where
                yield ExtractedRow(document, TASK, {"messages": turns, "origin": name})

    def _turns(self, row: Any, messages: list[Any], fields: ChatFields) -> tuple[list[Turn], str]:
        """The turns of a row, or why there is none."""
        known = [m for m in _by_time(messages, fields) if isinstance(m, dict)]
        roles = [self._role(message, fields) for message in known]
        is_answer = [role == "assistant" for role in roles]
        good = [True] * len(known)
        for rule in self.rules:
            verdict = judge(rule, row, known, is_answer)
            self.rules_seen.update([rule.text] if verdict.known else [])
            if not verdict.passes:
                return [], f"that --keep {rule.text} leaves out"
            good = [a and b for a, b in zip(good, verdict.answers or good, strict=True)]
        turns = list[Turn]()
        for message, role, is_good in zip(known, roles, good, strict=True):
            text = message_text(find(message, fields.text)).strip().replace("\0", "")
            if role == SKIP or _is_internal(message) or (role == "system" and turns):
                self.left_out["messages: notes, events and roles to skip"] += 1
            elif not text:
                self.left_out["messages without text"] += 1
            elif not _append(turns, role, text, is_good or role != "assistant"):
                self.left_out["messages: answers that --keep leaves out"] += 1
        return self._trimmed(turns)

    def _trimmed(self, turns: list[Turn]) -> tuple[list[Turn], str]:
        """The turns from the first question to the last good answer."""
        system = [turn for turn in turns[:1] if turn["role"] == "system"]
        rest = turns[len(system) :]
        while rest and rest[0]["role"] != "user":
            del rest[0]
            self.left_out["messages before the first question"] += 1
        while rest and (rest[-1]["role"] != "assistant" or rest[-1].get("train") is False):
            rest.pop()
            self.left_out["messages after the last good answer"] += 1
        answers = sum(turn["role"] == "assistant" for turn in rest)
        if not answers:
            return [], "without a question and a good answer to it"
        if answers < self.min_turns:
            return [], f"with fewer than {self.min_turns} answers"
        return [*system, *rest], ""

    def _role(self, message: Any, fields: ChatFields) -> str:
        written = str(find(message, fields.role))
        role = self.roles.get(normalized(written))
        if role is None:
            self.unknown_roles[written] += 1
            return SKIP
        self.seen_roles[written, role] += 1
        return role


def _messages(row: Any, fields: ChatFields) -> list[Any]:
    value = find(row, fields.messages or ())
    return value if isinstance(value, list) else []


def _grouped(
    rows: Iterable[tuple[str, Any]], fields: ChatFields, file: str
) -> Iterator[tuple[str, Any, list[Any]]]:
    """Rows that are messages, by conversation; a file without ids is one conversation."""
    groups: dict[str, tuple[str, list[Any]]] = {}
    for where, message in rows:
        key = str(find(message, fields.identity)) if fields.identity else file
        groups.setdefault(key, (where if fields.identity else file, []))[1].append(message)
    for where, messages in groups.values():
        row = {fields.identity[-1]: find(messages[0], fields.identity)} if fields.identity else {}
        yield where, row, messages


def _by_time(messages: list[Any], fields: ChatFields) -> list[Any]:
    """The messages in the order of their times, if all have comparable ones."""
    if fields.time is None:
        return messages
    times = [find(message, fields.time) for message in messages]
    same_kind = all(isinstance(t, str) for t in times) or all(
        isinstance(t, int | float) for t in times
    )
    if not same_kind or len({len(t) for t in times if isinstance(t, str)}) > 1:
        return messages  # texts of equal length, such as ISO 8601, sort by time
    return [messages[n] for n in sorted(range(len(times)), key=lambda n: times[n])]


def _is_internal(message: Any) -> bool:
    flags = {normalized(str(key)): value for key, value in message.items()}
    return any(flags.get(name) is True for name in INTERNAL) or flags.get("public") is False


def _append(turns: list[Turn], role: str, text: str, is_good: bool) -> bool:
    """Add a turn; the next message of the same side continues it.

    A good answer takes the place of one that is not, as a bot's before an agent's.

    Returns:
        Whether every message is still in a turn.
    """
    trained = {} if is_good else {"train": False}
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": text} | trained)
        return True
    if is_good != ("train" not in turns[-1]):
        if is_good:
            turns[-1] = {"role": role, "content": text}
        return False
    turns[-1]["content"] += f"\n{text}"
    return True
