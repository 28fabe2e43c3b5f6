"""Comparison of runs: which keys differ, and whether a difference in loss may be noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.root import app
from dtrain.core.errors import UserError
from dtrain.monitoring.compare import compare_runs, comparison_page, comparison_text

RECIPE = """\
name: {name}
stages:
  - {{name: task, kind: sft, method: {{kind: lora, r: {rank}}}, train: {{steps: 3}}}}
output: {{folder: runs/{name}}}
"""


def write_run(folder: Path, rank: int, change: list[float], **more: Any) -> Path:
    """A finished run whose blocks of 10 items have losses 20 + change."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(name=folder.name, rank=rank))
    losses = [20 + value for value in change]
    evaluation = {
        "models": ["base", "task"],
        "losses": {"prose": {"base": 3.0, "task": sum(losses) / (10 * len(losses))}},
        "blocks": {"prose": {"items": [10.0] * len(losses), "task": losses}},
        "metrics": {"prose": {"base": {"accuracy": 0.1}, "task": {"accuracy": 0.25 + rank / 100}}},
        "sets": {"prose": "abc"},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation | more))
    facts = {"name": "task", "seconds": 75.0, "tokens_per_second": 120.0}
    (folder / "lineage.json").write_text(json.dumps({"artifacts": [facts]}))
    (folder / "task").mkdir()
    lines = [{"step": n, "loss": 3.0 / n, "held_out": {"prose": 2.0 / n}} for n in (1, 2, 3)]
    (folder / "task" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_differences_are_named_with_their_uncertainty(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "one", 8, [0, 0, 0, 0]),
        write_run(tmp_path / "clear", 16, [-2.0, -2.1, -1.9, -2.0]),
        write_run(tmp_path / "noisy", 8, [-8, 7, 6, -6.0]),
        write_run(tmp_path / "other", 8, [1, 1, 1, 1], sets={"prose": "other rows"}),
    ]
    comparison = compare_runs(runs)
    losses, metrics, figures, keys = comparison.tables
    assert losses.head == ["held-out loss", "one", "clear", "noisy", "other"]
    ((_, first, clear, noisy, other),) = losses.rows
    assert first == "2.000"
    assert clear.startswith("1.800 (-0.200 ± 0.0") and "noise" not in clear
    assert noisy.startswith("1.975 (-0.025 ± 0.") and noisy.endswith(", noise)")
    assert other == "2.100 (other rows)"
    assert "another seed may change a loss by more" in comparison_text(comparison)
    assert metrics.rows == [["prose accuracy", "0.330", "0.410", "0.330", "0.330"]]
    assert ["task, time", *["1 min 15 s"] * 4] in figures.rows
    assert keys.rows == [["stages.task.method.r", "8", "16", "8", "8"]]
    text = comparison_text(comparison)
    assert "stages.task.method.r" in text and "± 0." in text
    page = comparison_page(comparison)
    assert page.count("<img") == 1 and "http" not in page and "<script" not in page


def test_the_command_prints_tables_and_writes_a_page(tmp_path: Path, capsys) -> None:
    runs = [str(write_run(tmp_path / name, rank, [0, 1])) for name, rank in (("a", 1), ("b", 2))]
    page = tmp_path / "page.html"
    app(["compare", *runs, "--html", str(page)], standalone_mode=False)
    assert "stages.task.method.r" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


def test_missing_files_and_equal_names_are_fine(tmp_path: Path) -> None:
    runs = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    for run in runs:
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("name: same\n")
    comparison = compare_runs(runs)
    assert comparison.names == [str(run) for run in runs] and comparison.tables == []
    assert comparison_page(comparison)


@pytest.mark.parametrize("runs", [["nowhere", "nothing"], ["nowhere"]])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, runs) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        app(["compare", *(str(tmp_path / run) for run in runs)], standalone_mode=False)
