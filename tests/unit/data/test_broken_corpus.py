"""A corpus with every kind of broken input is refused by file and line, or quarantined."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest

from dtrain.config.data import Clean, Source
from dtrain.core.errors import UserError
from dtrain.data.records import open_source
from dtrain.data_quality.clean import clean
from dtrain.data_quality.scan import scan

LINE_BYTES = 50_000_000
GOOD = b'{"instruction": "Name a %s that people keep.", "output": "It is kept by many people."}'
# file → (content between two good rows, error message, line)
BROKEN = {
    "utf8.jsonl": (b'{"instruction": "a", "output": "\xc3\x28\xff"}', "not UTF-8", 2),
    "nul.jsonl": (b'{"instruction": "a", "output": "b\\u0000c"}', "`output` contains a NUL", 2),
    "raw.jsonl": (b'{"instruction": "a", "output": "b\x00c"}', "invalid JSON", 2),
    "twice.jsonl": (
        b'{"instruction": "a", "output": "b", "output": "c"}',
        "duplicate key `output`",
        2,
    ),
    "mixed.jsonl": (b'{"text": "another format"}', "column `instruction` is missing", 2),
    "types.jsonl": (b'{"instruction": "a", "output": ["b"]}', "`output` must be a text, not a", 2),
    "list.jsonl": (b'["instruction", "output"]', "a row must be an object, not a list", 2),
    "long.jsonl": (b'{"output": "' + b"x" * LINE_BYTES + b'"}', "the line has 50,000,015 bytes", 2),
}


def write(folder, name):
    lines = [GOOD % b"dog", BROKEN[name][0], GOOD % name.encode()]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def cleaned(corpus, out, **policy):
    """The lines that stay and those that went."""
    result = scan([open_source(Source(path=str(corpus), format="alpaca"))])
    clean(
        result,
        Clean.model_validate({"exact_duplicate": "keep", "near_duplicate": "keep", **policy}),
        out,
    )
    names = ("rows-1.jsonl", "quarantine.jsonl")
    return [[json.loads(line) for line in (out / n).read_text().splitlines()] for n in names]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_row_is_refused_with_file_and_line(corpus, tmp_path, name) -> None:
    write(corpus, name)
    _, message, line = BROKEN[name]
    with pytest.raises(UserError, match=rf"{name}:{line}: .*{re.escape(message)}"):
        cleaned(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quarantine_removes_all_broken_rows_and_keeps_the_rest(corpus, tmp_path) -> None:
    for name in BROKEN:
        write(corpus, name)
    rows = [{"instruction": os.urandom(40).hex(), "output": "It is so."} for _ in range(3000)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (corpus / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])

    kept, gone = cleaned(corpus, tmp_path / "out", broken="quarantine")
    faults = {line["location"].rsplit("/", 1)[1]: line["error"] for line in gone}
    (cut,) = [location for location in faults if location.startswith("cut")]
    assert "truncated or damaged" in faults.pop(cut)
    whole = int(cut.rpartition(":")[2]) - 1
    assert 1000 < whole < 2000
    assert faults.keys() == {f"{name}:{line}" for name, (_, _, line) in BROKEN.items()}
    assert all(BROKEN[location.split(":")[0]][1] in fault for location, fault in faults.items())
    assert len(kept) == 2 * len(BROKEN) + whole


def test_scan_result_does_not_contain_the_long_line(corpus) -> None:
    write(corpus, "long.jsonl")
    result = scan([open_source(Source(path=str(corpus), format="alpaca"))])
    assert result.rows == 2 and result.unreadable == 1
    assert all(len(note) < 500 for note in result.unreadable_notes)
