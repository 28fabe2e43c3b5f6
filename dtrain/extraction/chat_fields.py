"""Find out how an export of conversations names its messages, roles and texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from dtrain.core.errors import UserError

# What support systems call the two sides, in addition to the roles of training rows.
SUPPORT_ROLES = {
    **dict.fromkeys(
        ("customer", "client", "visitor", "requester", "guest", "caller", "enduser", "endcustomer",
         "contact", "lead", "member", "patient", "student", "buyer", "inbound", "incoming",
         "question", "consumer", "subscriber"), "user",
    ),
    **dict.fromkeys(
        ("agent", "support", "operator", "admin", "staff", "representative", "rep", "advisor",
         "employee", "supportagent", "teammate", "outbound", "outgoing", "answer", "seller",
         "expert", "helpdesk", "customerservice", "csr", "moderator"), "assistant",
    ),
    **dict.fromkeys(("note", "internalnote", "event", "activity", "notification"), "skip"),
}  # fmt: skip
ROLE_KEYS = (
    "role", "from", "sender", "author", "speaker", "authorrole", "authortype", "sendertype",
    "senderrole", "usertype", "participant", "participanttype", "fromrole", "parttype",
    "direction", "type", "user", "source", "name", "side",
)  # fmt: skip
INNER_ROLE_KEYS = ("role", "type", "kind", "name")
TEXT_KEYS = (
    "content", "text", "body", "message", "value", "plainbody", "bodytext", "messagetext",
    "utterance", "comment", "msg", "transcript", "parts",
)  # fmt: skip
ID_KEYS = (
    "conversationid", "ticketid", "threadid", "sessionid", "chatid", "dialogueid", "dialogid",
    "caseid", "issueid", "threadts", "conversation", "ticket", "id",
)  # fmt: skip
TIME_KEYS = ("timestamp", "createdat", "created", "senttime", "sentat", "time", "date", "ts")
SAMPLE_ROWS = 200
MAX_DEPTH = 4  # of blocks in a message
MIN_KNOWN = 0.5  # share of messages whose role is known, for a key to be taken for the role

Path = tuple[str, ...]


@dataclass(frozen=True)
class ChatFields:
    """Paths of keys in the rows of an export.

    Attributes:
        messages: the list of messages in a row; None if each row is one message.
        role, text: in a message.
        identity: the column that distinguishes conversations; None if none does.
        time: of a message; None if it has none.
    """

    messages: Path | None
    role: Path
    text: Path
    identity: Path | None
    time: Path | None

    def __str__(self) -> str:
        name = ".".join
        parts = [
            f"messages in `{name(self.messages)}`" if self.messages else "a message in each row"
        ]
        parts += [f"role in `{name(self.role)}`", f"text in `{name(self.text)}`"]
        if self.identity:
            parts.append(f"conversation in `{name(self.identity)}`")
        return ", ".join([*parts, *([f"time in `{name(self.time)}`"] if self.time else [])])


def normalized(name: str) -> str:
    """'Author-Type' → 'authortype'."""
    return re.sub(r"[\W_]", "", name.lower())


def find(value: Any, path: Path) -> Any:
    """The value at a path of keys; None if there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def detect_fields(rows: list[Any], roles: Mapping[str, str], where: str) -> ChatFields:
    """Find the keys of an export by its first rows.

    Args:
        rows: parsed rows: objects, or lists of messages.
        roles: normalized role of an export → role of a training row.
        where: the file, for messages.

    Raises:
        UserError: they are no messages, with the keys that they have.
    """
    lists = _message_lists(rows, roles)
    best = max(lists, key=lambda path: lists[path], default=None)
    messages = [m for row in rows for m in _list_at(row, best)] if best is not None else rows
    role, text = _role_path(messages, roles), _text_path(messages)
    if role is None or text is None:
        raise _no_messages(rows, messages, "a role" if role is None else "a text", where)
    identity = _first_path(messages, ID_KEYS[:-1]) if best is None else _first_path(rows, ID_KEYS)
    return ChatFields(best, role, text, identity, _first_path(messages, TIME_KEYS))


def _message_lists(rows: list[Any], roles: Mapping[str, str]) -> Counter[Path]:
    """Paths to lists of messages, with the number of messages there; () for rows that are lists."""
    counts: Counter[Path] = Counter()
    for row in rows:
        for path, value in _lists(row):
            if any(_role_path([m], roles) and _text_path([m]) for m in value[:4]):
                counts[path] += len(value)
    return counts


def _lists(row: Any, path: Path = ()) -> Iterator[tuple[Path, list[Any]]]:
    """Lists of objects in a row, at most two keys deep."""
    if isinstance(row, list):
        if row and all(isinstance(item, dict) for item in row):
            yield path, row
    elif isinstance(row, dict) and len(path) < 2:
        for key, value in row.items():
            yield from _lists(value, (*path, str(key)))


def _list_at(row: Any, path: Path) -> list[Any]:
    value = find(row, path)
    return value if isinstance(value, list) else []


def _paths(messages: list[Any], known: tuple[str, ...]) -> list[Path]:
    """Paths of the messages' keys that a list knows, in its order."""
    keys = dict.fromkeys(str(k) for m in messages[:50] if isinstance(m, dict) for k in m)
    return [(key,) for name in known for key in keys if normalized(key) == name]


def _role_path(messages: list[Any], roles: Mapping[str, str]) -> Path | None:
    """The key whose values are known roles most often."""
    paths = _paths(messages, ROLE_KEYS)
    inner = [(*path, name) for path, name in product(paths, INNER_ROLE_KEYS)]
    shares = {
        path: sum(normalized(str(find(m, path))) in roles for m in messages) / len(messages)
        for path in (*paths, *inner)
        if any(isinstance(find(m, path), str | int | float) for m in messages)
    }
    best = max(shares, key=lambda path: shares[path], default=None)
    first = next(iter(shares), None)
    return best if best is not None and shares[best] >= MIN_KNOWN else first


def _text_path(messages: list[Any]) -> Path | None:
    paths = _paths(messages, TEXT_KEYS)
    counts = {p: sum(bool(message_text(find(m, p)).strip()) for m in messages) for p in paths}
    best = max(counts, key=lambda path: counts[path], default=None)
    return best if best is not None and counts[best] else None


def _first_path(rows: list[Any], known: tuple[str, ...]) -> Path | None:
    paths = [p for p in _paths(rows, known) if isinstance(find(rows[0], p), str | int | float)]
    return paths[0] if paths else None


def message_text(value: Any, depth: int = MAX_DEPTH) -> str:
    """The text of a message: a text, or blocks of which some are texts."""
    if isinstance(value, str) or depth == 0:
        return value if isinstance(value, str) else ""
    if isinstance(value, list):
        return "\n".join(filter(None, (message_text(item, depth - 1) for item in value)))
    if isinstance(value, dict):
        inner = (value[key] for key in value if normalized(str(key)) in TEXT_KEYS)
        return next((text for item in inner if (text := message_text(item, depth - 1))), "")
    return ""


def _no_messages(rows: list[Any], messages: list[Any], lacks: str, where: str) -> UserError:
    sample = messages or rows
    keys = dict.fromkeys(str(k) for m in sample[:50] if isinstance(m, dict) for k in m)
    known = "role, sender, author, from, …" if lacks == "a role" else "content, text, body, …"
    return UserError(
        f"no key of these rows is {lacks} of a message: {', '.join(keys) or 'they have no keys'}",
        where=where,
        fix=f"rename the key: a message has a role ({known}) and a text"
        if lacks == "a role"
        else f"rename the key: one of {known}",
    )
