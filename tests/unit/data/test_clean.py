"""Cleaning: nothing vanishes, nothing masked comes back, twice the same."""

from __future__ import annotations

import json

import pytest

from dtrain.config.schema import Clean, Source
from dtrain.core.errors import UserError
from dtrain.data.records import read
from dtrain.data.sources import find_source_files
from dtrain.data_quality.clean import as_row, clean, masked
from dtrain.data_quality.scan import Input, scan

ROWS = [
    {"instruction": "Explain the moon.", "output": "It is a rock that goes around the earth."},
    {"instruction": "Explain the sun.", "output": "Write to mei.lin@mail.com.cn about this star."},
    {"instruction": "Explain the moon.", "output": "It is a rock that goes around the earth."},
    {"instruction": "Explain rain.", "output": " "},
    {"instruction": "Explain snow.", "output": "Rain that is frozen, which is why it is white."},
]


@pytest.fixture
def cleaned(tmp_path, write_rows):
    """cleaned(rows, folder, **policy) → summary, lines that stay, lines that went"""

    def run(rows, name="out", **policy):
        path = write_rows("in.jsonl", rows)
        parts = find_source_files(Source(path=path), tmp_path / "cache")
        found = scan([Input(path, parts, "alpaca")])
        summary = clean(found, Clean.model_validate(policy), tmp_path / name)
        return summary, *(lines(tmp_path / name / f) for f in ("rows-1.jsonl", "quarantine.jsonl"))

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_kept_or_told(cleaned, tmp_path) -> None:
    summary, kept, gone = cleaned(ROWS)
    assert len(kept) + len(gone) == len(ROWS)
    assert [row["messages"][1]["content"] for row in kept] == [
        ROWS[0]["output"],
        "Write to [email] about this star.",
        ROWS[4]["output"],
    ]
    places = {f"{tmp_path}/in.jsonl:3": ["exact_duplicate"], f"{tmp_path}/in.jsonl:4": ["empty"]}
    assert {line["place"]: line["reasons"] for line in gone} == places
    assert all("row" not in line and line["action"] == "drop" for line in gone)
    counts = {"drop": 2, "email": 1, "empty": 1, "exact_duplicate": 1, "keep": 2, "mask": 1}
    assert summary["counts"] == counts


def test_quarantine_keeps_the_row_and_drop_is_stronger(cleaned) -> None:
    rows = [*ROWS, {"instruction": " ", "output": "4539 5787 6362 1486"}]
    _, kept, gone = cleaned(rows, empty="quarantine", personal="drop")
    assert len(kept) == 2
    by_line = {line["place"].rsplit(":", 1)[1]: line for line in gone}
    assert by_line["4"]["row"]["messages"][0]["content"] == "Explain rain."
    assert by_line["2"]["action"] == "drop" and "mei.lin" not in json.dumps(gone)
    assert set(by_line) == {"2", "3", "4", "6"}


def test_the_same_twice(cleaned) -> None:
    first, *_ = cleaned(ROWS, "one")
    second, *_ = cleaned(ROWS, "two")
    assert first == second
    assert cleaned(ROWS, "three", empty="keep")[0]["fingerprint"] != first["fingerprint"]


def test_broken_rows_stop_or_are_told(cleaned, tmp_path, write_rows) -> None:
    rows = [*ROWS, {"instruction": "no answer"}]
    with pytest.raises(UserError, match=r"in\.jsonl:6: column `output` is missing") as error:
        cleaned(rows)
    assert "clean.broken: quarantine" in error.value.fix
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    _, kept, gone = cleaned(rows, broken="quarantine")
    assert len(kept) + len(gone) == 6
    assert gone[-1]["reasons"] == ["broken"] and "`output` is missing" in gone[-1]["fault"]


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
def test_what_is_written_reads_back_equal(write_rows, tmp_path, row) -> None:
    def value(rows):
        parts = find_source_files(Source(path=write_rows("a.jsonl", rows)), tmp_path / "cache")
        return next(iter(read(parts, "auto"))).value

    before = value([row])
    assert value([as_row(before)]) == before
    assert masked(before) == before
