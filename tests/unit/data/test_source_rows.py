"""Rows are prepared, shown, scanned and cleaned under the same checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.config.data import Clean, Source
from dtrain.core.errors import UserError
from dtrain.data.conversations import Conversation
from dtrain.data.records import open_source, read_records
from dtrain.data.show import sequences
from dtrain.data.sources import find_source_files
from dtrain.data_quality.clean import clean
from dtrain.data_quality.report import build_report
from dtrain.data_quality.scan import TokenCounter, scan

FAMILIES = Path(__file__).with_name("templates")
ASKED = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
CALL = {"function": {"name": "add", "arguments": {"a": 2}}}
# As LLaMA-Factory's demo files of its second version have them.
PARTS = [
    {"role": "user", "content": [{"type": "text", "value": "hi"}], "loss_weight": 0.0},
    {"role": "assistant", "content": [{"type": "text", "value": "Hello!"}], "loss_weight": 1.0},
]
TOOL_USE = [
    {"role": "system", "content": [{"type": "text", "value": "Use tools."}]},
    {"role": "user", "content": [{"type": "text", "value": "Area of 1.5?"}]},
    {
        "role": "assistant",
        "content": [
            {"type": "reasoning", "value": "Call it."},
            {"type": "tool_call", "value": '{"name": "area", "arguments": {"radius": 1.5}}'},
        ],
    },
    {"role": "tool", "content": [{"type": "text", "value": "7.07"}]},
    {
        "role": "assistant",
        "content": [{"type": "reasoning", "value": "Say it."}, {"type": "text", "value": "7.07."}],
    },
]
AREA = {"type": "function", "function": {"name": "area", "parameters": {"type": "object"}}}


@pytest.fixture
def shown(prepared, tokenizer, write_rows):
    """shown(rows, **settings of the data) → what `data show` prints."""

    def run(rows, **settings):
        source = {"path": write_rows("rows.jsonl", rows)}
        dataset = prepared("sft", [source], sequence_length=512, **settings)
        chosen_tokenizer = settings.get("tokenizer", tokenizer)
        return "".join(map(str, sequences(dataset, chosen_tokenizer, 0, 9, False))), dataset

    return run


def test_content_blocks_with_weights_are_read(shown) -> None:
    text, _ = shown([{"messages": PARTS}])
    assert "user\nhi<|im_end|>" in text and "⟦Hello!<|im_end|>⟧" in text


def test_reasoning_and_tool_calls_in_content_blocks_are_read(shown, make_tokenizer) -> None:
    custom_tokenizer = make_tokenizer((FAMILIES / "reasoning.jinja").read_text())
    text, _ = shown(
        [{"messages": TOOL_USE, "tools": json.dumps([AREA])}], tokenizer=custom_tokenizer
    )
    assert (
        "⟦<think>\nCall it.\n</think>" in text
        and '"radius": 1.5}}\n</tool_call><|im_end|>⟧' in text
    )
    assert "⟦<think>\nSay it.\n</think>\n\n7.07.<|im_end|>⟧" in text


def test_changes_to_rows_are_reported(shown) -> None:
    rows = [
        {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, ANSWER]},
        {"messages": [ASKED, {**ANSWER, "weight": 0}]},
    ]
    text, dataset = shown(rows)
    for said in (text, dataset.describe()):
        assert "role `developer` read as `system` in 1 rows" in said
        assert "1 left out, no answer in them" in said


def test_turns_without_an_end_are_reported(shown, make_tokenizer) -> None:
    custom_tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    text, dataset = shown([{"messages": [ASKED, ANSWER]}] * 3, tokenizer=custom_tokenizer)
    for said in (text, dataset.describe()):
        assert "3 answers after which nothing that ends a turn is learned" in said


@pytest.mark.parametrize("kind", ["sft", "cpt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}]},
        {"messages": [ASKED, {**ANSWER, "function_call": CALL["function"]}]},
        {"messages": [ASKED, ANSWER], "tools": [AREA]},
        {"messages": [ASKED, ANSWER], "functions": [AREA["function"]]},
        {"messages": [ASKED, {**ANSWER, "reasoning": "Add."}]},
        {"prompt": [ASKED], "completion": [{**ANSWER, "reasoning": "Add."}]},
    ],
)
def test_content_dropped_by_the_template_is_refused_with_its_line(
    prepared, write_rows, row, kind
) -> None:
    rows = [row if number == 2 else {**row} for number in range(3)]
    plain = (
        {"messages": [ASKED, ANSWER]} if "messages" in row else {"prompt": "a", "completion": "b"}
    )
    path = write_rows("rows.jsonl", [plain, plain, rows[2]])
    with pytest.raises(UserError, match=r"rows\.jsonl:3: the chat template leaves out"):
        prepared(kind, [{"path": path}], sequence_length=512)


@pytest.fixture
def scanned(tokenizer, write_rows):
    """scanned(rows) → what a scan finds."""

    def run(rows, custom_tokenizer=tokenizer, train_on="all"):
        source = open_source(Source(path=write_rows("rows.jsonl", rows)))
        counter = TokenCounter(custom_tokenizer, "auto", train_on)
        return scan([source], token_counter=counter, sequence_length=512)

    return run


BAD = {"messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}]}


def test_scan_finds_rows_that_training_would_refuse(scanned) -> None:
    report = build_report(scanned([{"messages": [ASKED, ANSWER]}, BAD, BAD]))
    finding = next(f for f in report["findings"] if f["kind"] == "template")
    assert finding["rows"] == 2
    assert finding["examples"][0]["location"].endswith("rows.jsonl:2")
    assert "leaves out a tool call in message 2" in finding["examples"][0]["note"]


def test_scan_reports_how_the_template_changes_rows(scanned, make_tokenizer) -> None:
    custom_tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    rows = [{"messages": [{"role": "human", "content": "Two?"}, ANSWER]}]
    verdict = build_report(scanned(rows, custom_tokenizer))["verdict"]
    assert any(line["severe"] and "nothing that ends a turn" in line["text"] for line in verdict)
    assert any("role `human` read as `user`" in line["text"] for line in verdict)


def test_scan_finds_secrets_in_reasoning(scanned) -> None:
    thought = {**ANSWER, "reasoning_content": "Write to jane.doe@posteo.de about it."}
    result = scanned([{"messages": [ASKED, thought]}])
    assert result.has_finding("email").all()


def test_cleaned_rows_read_back_unchanged(scanned, tmp_path, write_rows) -> None:
    rows = [
        {"messages": PARTS},
        {"messages": [{"role": "developer", "content": "Be brief."}, ASKED, ANSWER]},
        {"messages": [ASKED, {**ANSWER, "train": False}, ASKED, {**ANSWER, "content": ["a", "b"]}]},
        {"messages": [ASKED, {**ANSWER, "reasoning": "Add."}]},
        BAD,
    ]
    result = scanned(rows)
    clean(result, Clean(short="keep", template="quarantine"), tmp_path / "out")

    def values(path):
        source_files = find_source_files(Source(path=str(path)), tmp_path / "cache")
        return [record.value for record in read_records(source_files, "messages")]

    kept = values(tmp_path / "out" / "rows-1.jsonl")
    assert kept == values(tmp_path / "rows.jsonl")[:3] and isinstance(kept[0], Conversation)
    away = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert '"add"' in away and away.count("\n") == 2
