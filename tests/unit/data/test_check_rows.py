"""Rows that a stage cannot use are found by `dtrain check` and `dtrain submit`, before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import UserError
from dtrain.data.check_rows import check_rows

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
GOOD, BAD = ({"prompt": "a", "completion": "b", "label": label} for label in (True, False))


@pytest.fixture
def check(tmp_path: Path, write_rows: Any) -> Any:
    """check(kind, rows of each source, of a held-out set) → None, or a UserError."""

    def run(kind: str, *sources: list[Any], held_out: list[Any] | None = None) -> None:
        paths = [{"path": write_rows(f"{n}.jsonl", rows)} for n, rows in enumerate(sources)]
        stage = {
            "name": "task", "kind": kind, "method": {"kind": "lora"}, "data": {"sources": paths},
            "train": {"global_batch_size": 1, "steps": 1},
        }  # fmt: skip
        recipe = {"name": "x", "model": {"base": "b"}, "output": {"folder": "runs/x"}}
        recipe["stages"] = [stage]
        if held_out:
            rows = {"kind": kind, "sources": [{"path": write_rows("held.jsonl", held_out)}]}
            recipe["evaluation"] = {"sets": {"rows": rows}}
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        report = CheckReport()
        check_rows(load_recipe(str(path), []), report)
        report.raise_errors()

    return run


def test_rows_that_suit_the_stage_pass(check: Any) -> None:
    check("dpo", [PAIR], held_out=[PAIR])
    check("kto", [GOOD, GOOD], [BAD], held_out=[GOOD])


def test_the_format_that_auto_finds_is_checked(check: Any) -> None:
    with pytest.raises(
        UserError, match=r"stages\.task\.data: \S*0\.jsonl: sft cannot train on pref"
    ):
        check("sft", [PAIR])
    with pytest.raises(UserError, match=r"evaluation\.sets\.rows: .*dpo cannot train on kto rows"):
        check("dpo", [PAIR], held_out=[GOOD])
    with pytest.raises(UserError, match=r"0\.jsonl:1: "):
        check("sft", [{"text of": "no format"}])


def test_answers_that_are_all_rated_alike(check: Any) -> None:
    with pytest.raises(UserError, match=r"stages\.task\.data: all 3 answers are labeled true"):
        check("kto", [GOOD, GOOD], [GOOD])


def test_what_is_not_read_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for name in ("a.md", "b.html", "c.html", "d.docx"):
        (tmp_path / "corpus" / name).write_text("a text")
    paths = ["https://host/rows.jsonl", "owner/rows", str(tmp_path / "corpus")]
    sources = ", ".join(f"{{path: {path!r}}}" for path in paths)
    report = CheckReport()
    check_rows(load_recipe("tiny", [f"stages.domain.data.sources=[{sources}]"]), report)
    notes = "\n".join(report.notes)
    assert not report.errors
    assert "rows.jsonl: not read here; the run downloads it" in notes
    assert "owner/rows: not read here; the run takes it for a data set" in notes
    assert "corpus: skips files of types that it cannot read: 2 .html, 1 .docx" in notes
    assert "dtrain:tiny-text: not read here; the run builds this sample" in notes
