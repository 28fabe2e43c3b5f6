"""Exports of conversations in the shapes of several systems become rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from dtrain.core.errors import UserError
from dtrain.data.conversations import ROLES
from dtrain.extraction.chat_fields import SUPPORT_ROLES
from dtrain.extraction.chat_rules import parse_rule
from dtrain.extraction.chats import ChatExtractor

Q, A = "How do I reset it?", "Hold the button for ten seconds."
EXPECTED = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHAPES: dict[str, list[Any]] = {
    "messages": [
        {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}
    ],
    "sharegpt": [{"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}],
    "author objects": [
        {
            "ticket_id": 7,
            "comments": [
                {
                    "id": 1,
                    "type": "Comment",
                    "author": {"role": "end-user", "name": "A"},
                    "body": Q,
                },
                {"id": 2, "type": "Comment", "author": {"role": "agent", "name": "B"}, "body": A},
            ],
        }
    ],
    "nested list": [
        {
            "id": 1,
            "conversation_parts": {
                "total_count": 2,
                "parts": [
                    {"part_type": "comment", "author": {"type": "user"}, "body": Q},
                    {"part_type": "comment", "author": {"type": "admin"}, "body": A},
                ],
            },
        }
    ],
    "directions": [
        {"thread": [{"direction": "inbound", "text": Q}, {"direction": "outbound", "text": A}]}
    ],
    "blocks": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": Q}]},
                {"role": "assistant", "content": [{"type": "text", "text": A}, {"type": "image"}]},
            ]
        }
    ],
    "a message in each row": [
        {"conversation_id": "c", "sender_type": "visitor", "message": Q, "timestamp": 1},
        {"conversation_id": "c", "sender_type": "operator", "message": A, "timestamp": 2},
    ],
    "newest first": [
        {"conversation_id": "c", "sender": "staff", "message": A, "ts": "2024-01-01T10:00:02Z"},
        {"conversation_id": "c", "sender": "client", "message": Q, "ts": "2024-01-01T10:00:01Z"},
    ],
    "lists of messages": [[{"role": "user", "text": Q}, {"role": "bot", "text": A}]],
    "notes, greetings and thanks": [
        {
            "messages": [
                {"role": "agent", "text": "Welcome!"},
                {"role": "customer", "text": Q},
                {"role": "agent", "text": "Ask Bob.", "private": True},
                {"role": "agent", "text": "He knows.", "public": False},
                {"role": "event", "text": "Bob joined"},
                {"role": "agent", "text": ""},
                {"role": "agent", "text": A},
                {"role": "customer", "text": "Thanks!"},
            ]
        }
    ],
}


def extract(
    rows: list[Any], *keep: str, min_turns: int = 1, **roles: str
) -> tuple[list[dict[str, Any]], ChatExtractor]:
    extractor = ChatExtractor(
        ROLES | SUPPORT_ROLES | roles, [parse_rule(rule) for rule in keep], min_turns, Counter()
    )
    _, found = extractor.extract([(f"f#{n}", row) for n, row in enumerate(rows, 1)], "f")
    return [row.row for row in found], extractor


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_exports(shape) -> None:
    rows, extractor = extract(SHAPES[shape])
    assert [row["messages"] for row in rows] == [EXPECTED]
    assert rows[0]["origin"].startswith("f")
    assert not extractor.unknown_roles


def test_origin_names_the_conversation() -> None:
    rows, _ = extract(SHAPES["author objects"])
    assert rows[0]["origin"] == "f#1 ticket_id=7"


def chat(*answers: dict[str, Any], **fields: Any) -> dict[str, Any]:
    turns = [[{"role": "user", "text": Q}, {"role": "agent", "text": A, **a}] for a in answers]
    return {"messages": [message for turn in turns for message in turn], **fields}


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("rating>=4", {"rating": 4}, {"rating": 3.5}),
        ("rating>=4", {"rating": "5"}, {}),
        ("csat.score=good", {"csat": {"score": "Good"}}, {"csat": {"score": "bad"}}),
        ("resolved", {"resolved": True}, {"resolved": False}),
        ("resolved", {"resolved": "yes"}, {"resolved": "no"}),
        ("!escalated", {"escalated": 0}, {"escalated": 1}),
        ("status!=open", {"status": "solved"}, {"status": "open"}),
    ],
)
def test_rules_choose_conversations(rule, good, bad) -> None:
    rows, extractor = extract([chat({}, **good), chat({}, **bad), chat({}, rating=0)], rule)
    assert [row["origin"] for row in rows] == (["f#1", "f#3"] if rule[0] == "!" else ["f#1"])
    assert extractor.left_out[f"conversations that --keep {rule} leaves out"] == 3 - len(rows)


def test_rules_choose_answers() -> None:
    accepted = chat({"accepted": False}, {"accepted": True}, {"accepted": False})
    (row,), _ = extract([accepted, chat({"accepted": False})], "accepted")
    assert [message.get("train") for message in row["messages"]] == [None, False, None, None]


def test_good_answer_replaces_a_bad_one_next_to_it() -> None:
    messages = [{"role": "user", "text": Q}, {"role": "bot", "text": "Wait.", "ok": 0}]
    messages += [{"role": "agent", "text": A, "ok": 1}, {"role": "agent", "text": "Bye.", "ok": 0}]
    (row,), extractor = extract([{"messages": messages}], "ok")
    assert row["messages"] == EXPECTED
    assert extractor.left_out == {"messages: answers that --keep leaves out": 2}


def test_rating_that_the_customer_sends_judges_the_conversation() -> None:
    def rated(stars: int) -> dict[str, Any]:
        return {"messages": [*chat({})["messages"], {"role": "user", "text": "!", "stars": stars}]}

    rows, _ = extract([rated(5), rated(2)], "stars>3")
    assert [row["messages"] for row in rows] == [EXPECTED]


def test_short_conversations_and_unknown_roles_are_counted() -> None:
    rows, extractor = extract([chat({}), chat({}, {})], min_turns=2)
    assert [row["origin"] for row in rows] == ["f#2"]
    assert extractor.left_out == {"conversations with fewer than 2 answers": 1}
    odd = {"messages": [{"role": "U1", "text": Q}, {"role": "U2", "text": A}]}
    assert extract([odd])[1].unknown_roles == {"U1": 1, "U2": 1}
    rows, _ = extract([odd], u1="user", u2="assistant")
    assert [row["messages"] for row in rows] == [EXPECTED]


@pytest.mark.parametrize(
    "rows", [[{"a": 1}], [{"messages": []}], [{"role": "user"}], [{"text": "a"}], [[[]]], [{}]]
)
def test_rows_that_hold_no_messages_are_refused(rows) -> None:
    with pytest.raises(UserError, match="of a message") as error:
        extract(rows)
    assert error.value.where == "f"


@pytest.mark.parametrize("rule", ["", "!", "a>b", "!a=1", ">=3", "a>=", "a<>2"])
def test_text_that_is_no_rule_is_refused(rule) -> None:
    with pytest.raises(UserError, match="is not a rule"):
        parse_rule(rule)


def test_values_of_any_type_are_no_traceback() -> None:
    odd = [None, 1, 1e308, "x", [], {}, [[1]], {"a": {"b": [None]}}, True]
    for value in odd:
        rows = [chat({"ok": value}, ok=value, id=value), {"messages": [value]}, {"messages": value}]
        rows += [{"messages": [{"role": value, "text": value}, *chat({})["messages"]]}]
        assert len(extract(rows, min_turns=1)[0]) >= 1
        extract(rows, "ok>=1")
