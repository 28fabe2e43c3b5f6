"""Rows of documentation and code: which files are read, and what becomes of the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dtrain.core.errors import UserError
from dtrain.extraction.code import extract_code, module_name
from dtrain.extraction.documentation import extract_documentation
from dtrain.extraction.text_files import DOMAIN, MAX_BYTES, TASK

PROSE = "This section tells in a few words how the thing is done, and why it is done so."
HEADINGS = ("# Guide", "## Set up", "## How to stop?", "## 1.2")
PAGE = "\n\n".join(f"{heading}\n\n{PROSE}" for heading in HEADINGS) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_rows_of_a_page_keep_their_origin(tmp_path) -> None:
    write(tmp_path / "docs" / "guide.md", PAGE)
    left_out: Counter[str] = Counter()
    rows = list(extract_documentation(tmp_path, left_out))
    assert {row.document for row in rows} == {"docs/guide.md"}
    (text,) = [row.row for row in rows if row.kind == DOMAIN]
    assert text == {"text": PAGE, "origin": "docs/guide.md"}
    asked = [
        (row.row["messages"][0]["content"], row.row["origin"]) for row in rows if row.kind == TASK
    ]
    assert asked == [
        ("What is “Guide” about?", "docs/guide.md:1"),
        ("What does “Guide” say about “Set up”?", "docs/guide.md:5"),
        ("How to stop?", "docs/guide.md:9"),
    ]
    assert left_out == {"sections whose heading has no word": 1}


def test_opening_paragraph_is_a_summary_of_a_longer_page(tmp_path) -> None:
    write(tmp_path / "a.md", f"# Guide\n\n{PROSE}\n" + f"\n## Part\n\n{PROSE} {PROSE}\n" * 3)
    rows = list(extract_documentation(tmp_path / "a.md", Counter()))
    question, answer = next(r.row["messages"] for r in rows if r.kind == TASK)
    assert question["content"].startswith("Summarize this page in a few sentences.\n\n# Guide\n")
    assert answer["content"] == PROSE and PROSE not in question["content"].splitlines()


def test_other_files_are_counted_by_reason(tmp_path) -> None:
    secret = write(tmp_path / "outside.md", PAGE)
    docs = tmp_path / "docs"
    write(docs / "good.md", PAGE)
    write(docs / "binary.md", b"\x89PNG\xff\xfe")
    write(docs / "nul.md", "a\0b")
    write(docs / "empty.md", " \n")
    write(docs / "large.md", b"x" * (MAX_BYTES + 1))
    write(docs / "page.html", "<p>")
    write(docs / ".git" / "hidden.md", PAGE)
    (docs / "link.md").symlink_to(secret)
    (docs / "gone.md").symlink_to(docs / "nowhere.md")
    (docs / "again").symlink_to(docs)
    left_out: Counter[str] = Counter()
    rows = list(extract_documentation(docs, left_out))
    assert {row.document for row in rows} == {"good.md"}
    del left_out["sections whose heading has no word"]
    assert left_out == {
        "files that are not UTF-8 text": 1,
        "binary files": 1,
        "empty files": 1,
        "files larger than 4 MiB": 1,
        "files of other types (.html)": 1,
        "links to files outside of the folder": 1,
        "not regular files": 1,
    }


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_to_read_is_refused(tmp_path, name) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file|no \.md or"):
        list(extract_documentation(tmp_path / name, Counter()))


def test_rows_of_code(tmp_path) -> None:
    write(tmp_path / "src/pack/__init__.py", '"""A package of useful things."""\n')
    source = (
        'raise SystemExit\ndef run(a, b=1):\n    """Run the thing two times. Raises OSError."""\n'
    )
    write(tmp_path / "src/pack/mod.py", source)
    write(tmp_path / "src/pack/broken.py", "def f(:")
    write(tmp_path / "src/pack/bare.py", "a = 1\n")
    write(tmp_path / "tests/test_mod.py", '"""Tests of the module."""\n')
    left_out: Counter[str] = Counter()
    rows = list(extract_code(tmp_path, left_out))
    by_kind = {kind: [r.row for r in rows if r.kind == kind] for kind in (DOMAIN, TASK)}
    assert by_kind[DOMAIN][1] == {
        "text": "pack.mod.run(a, b=1)\n\nRun the thing two times. Raises OSError.",
        "origin": "src/pack/mod.py:2",
    }
    asked = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in by_kind[TASK]}
    assert asked["How is the function `pack.mod.run` called?"] == "`pack.mod.run(a, b=1)`"
    assert left_out == {
        "files of tests": 1,
        "files that are not Python source of this version": 1,
        "files without public documented code": 1,
    }


def test_modules_are_named_as_they_are_imported(tmp_path) -> None:
    for name in ("site/pack/__init__.py", "site/pack/sub/__init__.py", "site/pack/sub/mod.py"):
        write(tmp_path / name, "")
    tool = write(tmp_path / "scripts" / "tool.py", "")
    assert module_name(tmp_path / "site/pack/sub/mod.py", tmp_path) == "pack.sub.mod"
    assert (
        module_name(tmp_path / "site/pack/sub/mod.py", tmp_path / "site/pack/sub") == "pack.sub.mod"
    )
    assert module_name(tmp_path / "site/pack/__init__.py", tmp_path) == "pack"
    assert module_name(tool, tmp_path) == "scripts.tool"
    assert module_name(tool, tool) == "tool"
