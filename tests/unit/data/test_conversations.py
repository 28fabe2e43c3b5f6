"""Unusual rows are read as intended, refused with their location, or reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.config.data import Source
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.data.conversations import parse_messages, parse_tools
from dtrain.data.formats import convert_row
from dtrain.data.records import detect_source_format, read_records
from dtrain.data.show import sequences
from dtrain.data.sources import find_source_files
from tests.unit.data.conftest import CHATML

ASKED = {"role": "user", "content": "Two and two?"}
BAD, GOOD = ({"role": "assistant", "content": text} for text in ("Five.", "Four."))


@pytest.fixture
def shown(prepared, write_rows, tokenizer):
    """shown([row, …], kind of stage) → what `data show` prints, learned text in ⟦ ⟧."""

    def run(rows, **settings):
        source = {"path": write_rows("rows.jsonl", rows)}
        dataset = prepared("sft", [source], **{"sequence_length": 256, **settings})
        chosen_tokenizer = settings.get("tokenizer", tokenizer)
        return "".join(
            str(text) for text in sequences(dataset, chosen_tokenizer, 0, 5, color=False)
        )

    return run


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0}, {"masked": 1}]
)
@pytest.mark.parametrize("kind", ["messages", "alpaca"])
def test_row_masked_as_a_whole_has_no_targets(shown, flag, kind) -> None:
    rows = {
        "messages": [{"messages": [ASKED, BAD], **flag}, {"messages": [ASKED, GOOD]}],
        "alpaca": [
            {"instruction": "Two?", "output": "Five.", **flag},
            {"instruction": "Two?", "output": "Four."},
        ],
    }
    text = shown(rows[kind])
    assert "Five." not in text and "⟦Four." in text
    assert "1 left out, no answer in them" in text


@pytest.mark.parametrize(
    "value", [{"weight": 1}, {"weight": 0.3}, {"loss": 2.5}, {"train": None}, {"masked": False}]
)
def test_other_values_of_a_mask_column_are_ignored(shown, value) -> None:
    assert "⟦Four." in shown([{"messages": [ASKED, GOOD], **value}])


def test_train_flags_of_turns_override_those_of_the_row(shown) -> None:
    turns = [ASKED, BAD, ASKED, {**GOOD, "weight": 1}]
    text = shown([{"messages": turns, "weight": 0}])
    assert "⟦Five." not in text and "⟦Four." in text


@pytest.mark.parametrize("key", ["loss_mask", "trainable", "train_on_turn"])
def test_alternative_turn_mask_keys_are_read(shown, key) -> None:
    text = shown([{"messages": [ASKED, {**BAD, key: 0}, ASKED, {**GOOD, key: 1}]}])
    assert "⟦Five." not in text and "⟦Four." in text


def blocks(*flags):
    return [
        {"type": "text", "text": f"t{n}", **({} if flag is None else {"train": flag})}
        for n, flag in enumerate(flags)
    ]


def test_train_flags_of_blocks_apply_to_the_turn(shown) -> None:
    masked = {"role": "assistant", "content": blocks(False, False)}
    text = shown([{"messages": [ASKED, masked, ASKED, GOOD]}])
    assert "⟦t0" not in text and "⟦Four." in text


@pytest.mark.parametrize("flags", [(True, False), (None, False)])
def test_blocks_with_different_train_flags_are_refused(flags) -> None:
    turns = [ASKED, {"role": "assistant", "content": blocks(*flags)}]
    with pytest.raises(
        UserError, match=r"f:1: the blocks of `messages\[1\]` differ in whether they have loss"
    ):
        parse_messages(turns, "messages", "f:1")


def test_ignored_keys_and_unknown_roles_are_reported(shown) -> None:
    odd = {**GOOD, "thought": "R1", "prefix": None, "name": "bot", "quality": 0}
    row = {"messages": [{"role": "critic", "content": "Well."}, ASKED, odd], "topic": "x"}
    text = shown([row])
    assert "column `topic` is not read in 1 rows" in text
    assert "message key `thought` is not read in 1 rows" in text
    assert "message key `quality` is not read in 1 rows" in text
    assert "role `critic` is not standard: rendered as written, without loss in 1 rows" in text
    assert "`prefix`" not in text and "`name`" not in text


@pytest.mark.parametrize(
    ("reads", "silent"), [("m.tools", True), ("m['tools']", True), ("", False)]
)
def test_key_with_another_meaning_in_the_template_is_not_read(
    shown, make_tokenizer, reads, silent
) -> None:
    custom_tokenizer = make_tokenizer(
        "{% if tools %}<tools>{% endif %}" + CHATML + f"{{# {reads} #}}"
    )
    text = shown(
        [{"messages": [{**ASKED, "tools": [{"name": "f"}]}, GOOD]}], tokenizer=custom_tokenizer
    )
    assert ("message key `tools` is not read in 1 rows" not in text) == silent


def test_dropped_reasoning_of_a_question_is_refused(shown) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: .* leaves out the reasoning of message 1"):
        shown([{"messages": [{**ASKED, "reasoning_content": "R"}, GOOD]}])


@pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_tool_call_arguments_under_both_names(key, arguments) -> None:
    turns = [ASKED, {"role": "assistant", "tool_calls": [{"name": "add", key: arguments}]}]
    (call,) = parse_messages(turns, "messages", "f:1")[1]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 2}}


@pytest.mark.parametrize("none", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": {}}])
def test_tool_call_without_arguments(none) -> None:
    turns = [ASKED, {"role": "assistant", "tool_calls": [{"name": "now", "id": "1", **none}]}]
    (call,) = parse_messages(turns, "messages", "f:1")[1]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": {}}


CALL = {"function": {"name": "add", "arguments": {"a": 2}}}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {"tool_calls": [{"name": "add", "input": {"a": 2}}]},
            "has no `arguments`, but input",
        ),
        ({"tool_calls": [{"name": "add", "arguments": [2]}]}, "must be an object, not a list"),
        ({"tool_calls": [{"name": "add", "arguments": 0}]}, "must be an object, not a number"),
        ({"tool_calls": [{"name": "add", "arguments": '"a"'}]}, "must be an object, not a text"),
        ({"tool_calls": [CALL], "function_call": CALL["function"]}, "has both `tool_calls` and"),
        ({"content": "See.", "images": ["x.png"]}, "is not a text: images"),
    ],
)
def test_message_content_that_would_be_lost_is_refused(turn, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_messages([ASKED, {"role": "assistant", **turn}], "messages", "f:1")
    assert "f:1: `messages[1]" in str(caught.value)


@pytest.mark.parametrize("tool", [{"type": "function", "function": {}}, {"description": "d"}])
def test_a_tool_without_a_name_is_refused(tool) -> None:
    with pytest.raises(UserError, match=r"f:1: `tools\[0\]` has no function name"):
        parse_tools([tool], "f:1")


@pytest.mark.parametrize("instruction", ["", " \n"])
def test_instruction_only_in_the_input_is_used_once(instruction) -> None:
    row = {"instruction": instruction, "input": "Two and two?", "output": "Four."}
    asked = convert_row(row, "alpaca", {}, "f:1").messages[0]
    assert (asked["content"], asked["instruction"], asked["input"]) == (
        "Two and two?",
        "Two and two?",
        "",
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "instruction,output\n"),
        ("a.csv", ""),
        ("a.json", "[]"),
        ("a.json", '{"data": []}'),
        ("a.jsonl", "\n\n"),
    ],
)
def test_source_without_rows_is_reported_as_empty(tmp_path: Path, name, content) -> None:
    (tmp_path / name).write_text(content)
    source_files = find_source_files(Source(path=str(tmp_path / name)), tmp_path)
    with pytest.raises(EmptyDataError, match=f"{name}: the source has no rows"):
        detect_source_format(source_files, {})


def test_rows_under_a_key_that_is_also_a_turn_mask(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"messages": [ASKED, GOOD]}]}))
    source_files = find_source_files(Source(path=str(tmp_path / "a.json")), tmp_path)
    (record,) = read_records(source_files, "auto")
    assert [message["content"] for message in record.value.messages] == ["Two and two?", "Four."]
