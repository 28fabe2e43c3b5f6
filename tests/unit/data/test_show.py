"""`dtrain data show` prints exactly the tokens of training and marks the targets."""

from __future__ import annotations

from dtrain.config.data import Source
from dtrain.data.records import iter_records
from dtrain.data.show import render_records, sequences
from dtrain.data.sources import find_source_files

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, é."}]


def test_tokens_with_loss_are_highlighted(prepared, write_rows, tokenizer) -> None:
    path = write_rows("a.jsonl", [{"messages": TURNS}, {"messages": TURNS}])
    dataset = prepared("sft", [{"path": path}], sequence_length=200)
    output = "".join(text.plain for text in sequences(dataset, tokenizer, 0, 5, color=False))
    assert output.count("⟦Me, é.<|im_end|>⟧") == 2 and "⟦" not in output.split("Who?")[0]
    assert output.count("sequence") == 1 and f"{path}:1: tokens 0–" in output
    colored = list(sequences(dataset, tokenizer, 0, 1, color=True))
    green = [t.plain[s.start : s.end] for t in colored for s in t.spans if s.style == "green"]
    assert green == ["Me, é.<|im_end|>"] * 2


def test_rows_of_a_path_are_shown_with_errors_and_without_control_characters(
    write_rows, tmp_path
) -> None:
    rows = [
        {"prompt": "a\x1b[2J", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b"},
    ]
    source_files = find_source_files(Source(path=write_rows("a.jsonl", rows)), tmp_path / "cache")
    output = "".join(
        text.plain for text in render_records(iter_records(source_files, "auto"), source_files, 9)
    )
    assert "user: a␛[2J\n" in output and "\x1b" not in output
    assert "rejected\nuser: a␛[2J\nassistant: c" in output
    assert "a.jsonl:2: column `rejected` is missing" in output


def test_a_long_text_is_shortened(write_rows, tmp_path) -> None:
    source_files = find_source_files(
        Source(path=write_rows("a.jsonl", [{"text": "ab" * 3000}])), tmp_path
    )
    (_, shown) = render_records(iter_records(source_files, "auto"), source_files, 1)
    assert shown.plain == "ab" * 2000 + " … and 2,000 more characters\n"
