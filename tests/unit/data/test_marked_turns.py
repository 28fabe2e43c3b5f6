"""Turns that a row or a template marks as targets, or as none."""

from __future__ import annotations

import pytest

from dtrain.core.errors import UserError
from dtrain.data.conversations import parse_messages
from tests.unit.data.turns import AGAIN, ASKED, CALL, assistant_turn

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


# Turns that a row marks

BAD, GOOD = "BAD", "GOOD<|im_end|>"


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {}),
        ({"loss": False}, {"loss": True}),
        ({"loss_weight": 0}, {"loss_weight": 1.0}),
        ({"masked": True}, {"masked": False}),
        ({"weight": 0, "train": False}, {"weight": None}),
    ],
)
@pytest.mark.parametrize("sharegpt", [False, True])
@pytest.mark.parametrize("family", ["chatml", MARKED], ids=["chatml", "marked"])
def test_turn_masked_by_the_row_is_not_a_target(target_texts, family, sharegpt, bad, good) -> None:
    turns = [ASKED, assistant_turn(BAD, **bad), AGAIN, assistant_turn("GOOD", **good)]
    if sharegpt:
        names = {"user": "human", "assistant": "gpt"}
        turns = [
            {"from": names[t.pop("role")], "value": t.pop("content"), **t} for t in map(dict, turns)
        ]
    assert target_texts(family, turns)[0] == [GOOD]
    assert target_texts(family, turns, train_on="last")[0] == [GOOD]
    assert target_texts(family, turns[:2])[0] == []


@pytest.mark.parametrize("key", ["train", "weight", "loss"])
def test_turn_enabled_by_the_row_is_a_target(target_texts, key) -> None:
    turns = [
        {**ASKED, key: True},
        assistant_turn("Four.", **{key: True}),
        AGAIN,
        assistant_turn("Six."),
    ]
    assert target_texts("chatml", turns)[0] == [
        "Two and two?<|im_end|>",
        "Four.<|im_end|>",
        "Six.<|im_end|>",
    ]
    assert target_texts("chatml", turns[1:], train_on="last")[0] == ["Six.<|im_end|>"]


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": 0.5}, r"`messages\[1\].weight` must be 0 or 1 .* not 0.5"),
        ({"loss_weight": 2}, "must be 0 or 1"),
        ({"train": "no"}, r"`messages\[1\].train` must be 0 or 1"),
        (
            {"weight": 1, "train": False},
            r"the keys weight, train of `messages\[1\]` contradict each other",
        ),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail"),
    ],
)
def test_invalid_train_flags_are_refused(marks, message) -> None:
    with pytest.raises(UserError, match=message):
        parse_messages([ASKED, assistant_turn("Four.", **marks)], "messages", "f:1")


# Marks of the template


@pytest.mark.parametrize(
    "marks",
    [
        MARKED.replace(
            "{{ m.content + '<|im_end|>' }}{% endgen", "{{ m.content }}{% endgen", 1
        ).replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"),
        MARKED.replace(
            "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"
        ),
        MARKED.replace("{% generation %}{{ m.content", "{{ m.content }}{% generation %}{{ ''"),
        MARKED.replace(
            "{% generation %}{{ m.content", "{{ m.content[:2] }}{% generation %}{{ m.content[2:]"
        ),
    ],
    ids=["no end", "last only", "none", "half"],
)
def test_generation_tags_that_miss_part_of_an_answer_are_refused(target_texts, marks) -> None:
    with pytest.raises(UserError, match=r"f:1: .*marks leave out"):
        target_texts(marks, [ASKED, assistant_turn("Four."), AGAIN, assistant_turn("Six.")])


def test_generation_tags_may_split_an_answer(target_texts) -> None:
    two = MARKED.replace(
        "{{ m.content + '<|im_end|>' }}{% endgen",
        "{{ m.content }}{% endgeneration %}\n{% generation %}{{ m.tool_calls | tojson }}"
        "{{ '<|im_end|>' }}{% endgen",
        1,
    )
    texts, _ = target_texts(
        two,
        [
            ASKED,
            assistant_turn("See.", tool_calls=[CALL]),
            AGAIN,
            assistant_turn("Six.", tool_calls=[CALL]),
        ],
    )
    assert [text[:5] for text in texts] == ["See.", '[{"ty', "Six.", '[{"ty']
