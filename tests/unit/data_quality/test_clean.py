"""Cleaning accounts for every row, masks for good, and is reproducible."""

from __future__ import annotations

import json

import pytest

from dtrain.config.data import Clean, Source
from dtrain.core.errors import UserError
from dtrain.data.formats import to_row
from dtrain.data.records import SourceRows, read_records
from dtrain.data.sources import find_source_files
from dtrain.data_quality.clean import clean, mask_value
from dtrain.data_quality.scan import scan

ROWS = [
    {"instruction": "Explain the moon.", "output": "It is a rock that goes around the earth."},
    {"instruction": "Explain the sun.", "output": "Write to mei.lin@mail.com.cn about this star."},
    {"instruction": "Explain the moon.", "output": "It is a rock that goes around the earth."},
    {"instruction": "Explain rain.", "output": " "},
    {"instruction": "Explain snow.", "output": "Rain that is frozen, which is why it is white."},
]


@pytest.fixture
def clean_rows(tmp_path, write_rows):
    """clean_rows(rows, folder, **policy) → summary, remaining rows, removed rows."""

    def run(rows, name="out", **policy):
        path = write_rows("in.jsonl", rows)
        files = find_source_files(Source(path=path), tmp_path / "cache")
        result = scan([SourceRows(path, files, "alpaca")])
        summary = clean(result, Clean.model_validate(policy), tmp_path / name)
        return summary, *(lines(tmp_path / name / f) for f in ("rows-1.jsonl", "quarantine.jsonl"))

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_kept_or_listed_with_a_reason(clean_rows, tmp_path) -> None:
    summary, kept, removed = clean_rows(ROWS)
    assert len(kept) + len(removed) == len(ROWS)
    assert [row["messages"][1]["content"] for row in kept] == [
        ROWS[0]["output"],
        "Write to [email] about this star.",
        ROWS[4]["output"],
    ]
    reasons = {f"{tmp_path}/in.jsonl:3": ["exact_duplicate"], f"{tmp_path}/in.jsonl:4": ["empty"]}
    assert {line["location"]: line["reasons"] for line in removed} == reasons
    assert all("row" not in line and line["action"] == "drop" for line in removed)
    counts = {"drop": 2, "email": 1, "empty": 1, "exact_duplicate": 1, "keep": 2, "mask": 1}
    assert summary["counts"] == counts


def test_quarantine_keeps_the_row_and_drop_takes_precedence(clean_rows) -> None:
    rows = [*ROWS, {"instruction": " ", "output": "4539 5787 6362 1486"}]
    _, kept, removed = clean_rows(rows, empty="quarantine", personal="drop")
    assert len(kept) == 2
    by_line = {line["location"].rsplit(":", 1)[1]: line for line in removed}
    assert by_line["4"]["row"]["messages"][0]["content"] == "Explain rain."
    assert by_line["2"]["action"] == "drop" and "mei.lin" not in json.dumps(removed)
    assert set(by_line) == {"2", "3", "4", "6"}


def test_cleaning_is_reproducible(clean_rows) -> None:
    first, *_ = clean_rows(ROWS, "one")
    second, *_ = clean_rows(ROWS, "two")
    assert first == second
    assert clean_rows(ROWS, "three", empty="keep")[0]["fingerprint"] != first["fingerprint"]


def test_unreadable_rows_stop_cleaning_or_are_listed(clean_rows, tmp_path, write_rows) -> None:
    rows = [*ROWS, {"instruction": "no answer"}]
    with pytest.raises(UserError, match=r"in\.jsonl:6: column `output` is missing") as error:
        clean_rows(rows)
    assert "clean.broken: quarantine" in error.value.fix
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    _, kept, removed = clean_rows(rows, broken="quarantine")
    assert len(kept) + len(removed) == 6
    assert removed[-1]["reasons"] == ["broken"] and "`output` is missing" in removed[-1]["error"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"instruction": "a", "input": "b", "output": "c", "system": "d"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "label": False},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            ],
            "tools": [{"name": "f"}],
        },
    ],
    ids=lambda row: ",".join(row),
)
def test_written_rows_read_back_equal(write_rows, tmp_path, row) -> None:
    def read_value(rows):
        files = find_source_files(Source(path=write_rows("a.jsonl", rows)), tmp_path / "cache")
        return next(iter(read_records(files, "auto"))).value

    before = read_value([row])
    assert read_value([to_row(before)]) == before
    assert mask_value(before) == before
