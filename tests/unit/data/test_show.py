"""What `dtrain data show` prints: exactly the tokens of training, and which of them are learnt."""

from __future__ import annotations

from dtrain.config.schema import Source
from dtrain.data.records import iter_records
from dtrain.data.show import render_records, sequences
from dtrain.data.sources import find_source_files

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, é."}]


def test_the_learnt_tokens_are_marked(prepared, write_rows, tokenizer) -> None:
    path = write_rows("a.jsonl", [{"messages": TURNS}, {"messages": TURNS}])
    dataset = prepared("sft", [{"path": path}], sequence_length=200)
    told = "".join(text.plain for text in sequences(dataset, tokenizer, 0, 5, colour=False))
    assert told.count("⟦Me, é.<|im_end|>⟧") == 2 and "⟦" not in told.split("Who?")[0]
    assert told.count("sequence") == 1 and f"{path}:1: tokens 0–" in told
    coloured = list(sequences(dataset, tokenizer, 0, 1, colour=True))
    green = [t.plain[s.start : s.end] for t in coloured for s in t.spans if s.style == "green"]
    assert green == ["Me, é.<|im_end|>"] * 2


def test_rows_as_brought_with_faults_and_without_orders_to_the_terminal(
    write_rows, tmp_path
) -> None:
    rows = [
        {"prompt": "a\x1b[2J", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b"},
    ]
    parts = find_source_files(Source(path=write_rows("a.jsonl", rows)), tmp_path / "cache")
    told = "".join(text.plain for text in render_records(iter_records(parts, "auto"), parts, 9))
    assert "user: a␛[2J\n" in told and "\x1b" not in told
    assert "not wanted\nuser: a␛[2J\nassistant: c" in told
    assert "a.jsonl:2: column `rejected` is missing" in told


def test_of_a_book_the_head_is_shown(write_rows, tmp_path) -> None:
    parts = find_source_files(Source(path=write_rows("a.jsonl", [{"text": "ab" * 3000}])), tmp_path)
    (_, shown) = render_records(iter_records(parts, "auto"), parts, 1)
    assert shown.plain == "ab" * 2000 + " … and 2,000 more characters\n"
