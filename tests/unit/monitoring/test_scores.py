"""Scores in evaluation.json: what stays comparable, how certain a change is, and where it shows."""

from __future__ import annotations

import json
from math import nan, sqrt
from pathlib import Path
from typing import Any

import pytest

from dtrain.monitoring.compare import compare_runs, comparison_text
from dtrain.monitoring.report import render_report
from dtrain.monitoring.run_record import read_run, run_summary
from dtrain.monitoring.scores import Score, adopt_scores, get_score, put_scores, score_rows


def evaluation(*values: float, inputs: str = "rows", stderr: float = 0.01) -> dict[str, Any]:
    """The content of evaluation.json: accuracies of the base and of the stages."""
    content: dict[str, Any] = {"models": ["base", "task"][: len(values)]}
    for model, value in zip(content["models"], values, strict=True):
        put_scores(content, model, "quiz", {"acc": Score(value, stderr)}, inputs)
    return json.loads(json.dumps(content))


def write_run(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_scores_survive_the_file() -> None:
    score = Score(0.5, 0.1, False, (1.0, 2.0), (3.0, 3.0))
    content: dict[str, Any] = {}
    put_scores(content, "base", "quiz", {"perplexity": score}, "rows")
    assert get_score(json.loads(json.dumps(content)), "base", "quiz", "perplexity") == score


def test_scores_of_other_rows_are_removed() -> None:
    content = evaluation(0.5, 0.6)
    put_scores(content, "task", "quiz", {"acc": Score(0.7)}, "other rows")
    assert get_score(content, "base", "quiz", "acc") is None
    assert get_score(content, "task", "quiz", "acc") == Score(0.7)


def test_a_change_is_as_certain_as_its_pairs_of_rows() -> None:
    base, task = Score(0.5, 0.1), Score(0.6, 0.1)
    assert task.stderr_of_change(base) == pytest.approx(sqrt(0.02))
    assert task.rating(base) == "noise"
    items = (10.0,) * 4
    base = Score(0.5, 0.1, True, (5.0, 4.0, 6.0, 5.0), items)
    task = Score(0.6, 0.1, True, (6.0, 5.1, 6.9, 6.0), items)
    error = task.stderr_of_change(base)
    assert error is not None and error < 0.01
    assert task.rating(base) == "better" and base.rating(task) == "worse"
    assert Score(nan).rating(base) == "same"


def test_a_perplexity_is_better_if_it_falls() -> None:
    assert Score(9.0, 0.1, False).rating(Score(10.0, 0.1, False)) == "better"


def test_rows_name_models_without_a_score() -> None:
    content = evaluation(0.5)
    content["models"].append("task")
    (row,) = score_rows(content)
    assert row.scores == [Score(0.5, 0.01), None] and row.last is row.base
    assert row.change(row.last) is None


def test_terminal_report_and_comparison_show_before_after_and_change(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", evaluation(0.5, 0.6))
    summary = run_summary(run)
    assert "quiz acc   0.500 ± 0.010   0.600 ± 0.010   +0.100 ± 0.014   better" in summary
    page = render_report(read_run(run))
    assert "0.600 ± 0.010" in page and '<span class="badge better">+0.100 ± 0.014</span>' in page
    noisy = write_run(tmp_path / "noisy", evaluation(0.5, 0.61))
    other = write_run(tmp_path / "other", evaluation(0.5, 0.7, inputs="other rows"))
    text = comparison_text(compare_runs([run, noisy, other]))
    (line,) = [line for line in text.splitlines() if line.startswith("quiz acc")]
    assert "0.610 (+0.010 ± 0.014, noise)" in line
    assert "0.700 ± 0.010 (other rows or settings)" in line


def test_scores_with_the_same_inputs_are_adopted() -> None:
    other = evaluation(0.5, 0.6)
    put_scores(other, "base", "old", {"acc": Score(0.1)}, "old rows")
    content: dict[str, Any] = {}
    adopt_scores(content, other, ["base"], {"quiz": "rows", "old": "new rows"})
    assert get_score(content, "base", "quiz", "acc") == Score(0.5, 0.01)
    assert get_score(content, "base", "old", "acc") is None
    assert get_score(content, "task", "quiz", "acc") is None
