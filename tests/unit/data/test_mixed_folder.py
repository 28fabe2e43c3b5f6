"""A folder of files of many types: what is read, and what is said to be left out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dtrain.config.data import Source
from dtrain.data.records import Record, open_source

ROW = {"instruction": "question", "output": "answer"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts of every type that is one document, and files that dtrain cannot read."""
    folder = tmp_path / "docs"
    (folder / "more").mkdir(parents=True)
    for name in ("a.md", "b.txt", "more/c.rst"):
        (folder / name).write_text(f"the text of {name}")
    (folder / "d.md.gz").write_bytes(gzip.compress(b"the text of d.md.gz"))
    for name in ("page.html", "more/page.HTML", "LICENSE", "scan.pdf"):
        (folder / name).write_text("x")
    for hidden in (".git/description.txt", ".notes.md"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("hidden")
    return folder


def read(folder: Path) -> tuple[str, list[object]]:
    rows = open_source(Source(path=str(folder)))
    return rows.row_format, [item.value for item in rows.rows() if isinstance(item, Record)]


def test_every_text_of_a_folder_is_read_and_the_rest_is_counted(folder, capsys) -> None:
    (folder / "e.jsonl").write_text(json.dumps({"text": "a row"}))
    (folder / "f.tsv").write_text('number\ttext\n1\t"a cell, with\ta tab"\n')
    row_format, values = read(folder)
    assert row_format == "text"
    names = ["a.md", "b.txt", "d.md.gz", "more/c.rst"]
    rows = ["a row", "a cell, with\ta tab"]
    assert sorted(values) == sorted([f"the text of {name}" for name in names] + rows)
    expected = f"{folder}: skips files of types that it cannot read: "
    assert expected + "2 .html, 1 without suffix, 1 .pdf\n" in capsys.readouterr().out


def test_columns_are_those_of_rows_not_of_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "a row"}))
    (tmp_path / "b.md").write_text("a text")
    rows = open_source(Source(path=str(tmp_path), columns={"text": "content"}))
    assert [item.value for item in rows.rows()] == ["a row", "a text"]  # type: ignore[union-attr]


def test_a_readme_beside_conversations_is_left_out_and_named(folder, capsys) -> None:
    (folder / "z.jsonl").write_text(json.dumps(ROW))
    row_format, values = read(folder)
    assert row_format == "alpaca" and len(values) == 1
    message = "the rows of the source are alpaca: 1 .md, 1 .txt, 1 .md.gz, 1 .rst\n"
    assert message in capsys.readouterr().out


def test_cells_of_a_tsv_are_checked_like_those_of_a_csv(tmp_path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("instruction\toutput\nquestion\tanswer\none cell\n")
    rows = open_source(Source(path=str(path)))
    good, bad = rows.rows()
    assert rows.row_format == "alpaca" and good.value.messages[1]["content"] == "answer"
    assert str(bad.error).startswith(f"{path}:3: 1 cells, but the header has 2 columns")
