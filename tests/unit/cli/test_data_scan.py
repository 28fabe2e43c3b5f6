"""`dtrain data scan RECIPE` reads the rows of all stages: faults in a later one are found, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dtrain.cli.data import app
from dtrain.config.schema import Recipe, Stage
from dtrain.data_quality.scan_result import ScanResult
from dtrain.pipeline import data_inspection

RECIPE = """\
name: two
model: {base: some/base}
stages:
  - name: domain
    kind: cpt
    method: {kind: lora}
    data: {sources: [{path: texts.jsonl, format: text}]}
    train: {global_batch_size: 1, steps: 1}
  - name: task
    kind: sft
    method: {kind: lora}
    data: {sources: [{path: rows.jsonl, format: alpaca}]}
    train: {global_batch_size: 1, steps: 1}
output: {folder: run}
"""


def scan_without_tokenizer(recipe: Recipe, stage: Stage, processes: int) -> ScanResult:
    return data_inspection.scan_path(stage.data.sources[0].path, [], processes)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_inspection, "scan_stage", scan_without_tokenizer)
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "texts.jsonl").write_text('{"text": "The pump opens."}\n')
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Open?", "output": "Yes."}\n{"instruc\n')
    return tmp_path


def test_rows_of_every_stage_are_scanned(folder: Path) -> None:
    arguments = ["scan", "my.yaml", "--processes", "1", "--json", "scan.json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "rows.jsonl:2: invalid JSON" in (folder / "scan-task.json").read_text()
    assert (folder / "scan-domain.json").exists() and not (folder / "scan.json").exists()


def test_one_stage_has_the_file_that_was_named(folder: Path) -> None:
    arguments = ["scan", "my.yaml", "--stage", "task", "--processes", "1", "--json", "scan.json"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [path.name for path in folder.glob("scan*.json")] == ["scan.json"]
