"""Runs that differ only by their seed: mean, spread, and whether a difference is noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.monitoring.compare import compare_runs, comparison_page, comparison_text
from dtrain.monitoring.uncertainty import compare_means

RECIPE = (
    "name: {name}\nseed: {seed}\nstages:\n  - {{name: task, train: {{learning_rate: {rate}}}}}\n"
)


def write_run(folder: Path, seed: int, rate: float, loss: float) -> Path:
    folder.mkdir()
    folder.joinpath("recipe.yaml").write_text(
        RECIPE.format(name=folder.name, seed=seed, rate=rate) + f"output: {{folder: {folder}}}\n"
    )
    evaluation = {"models": ["task"], "losses": {"prose": {"task": loss}}, "sets": {"prose": "x"}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def runs(tmp_path: Path, name: str, rate: float, losses: dict[int, float]) -> list[Path]:
    return [write_run(tmp_path / f"{name}{s}", s, rate, loss) for s, loss in losses.items()]


def test_groups_of_seeds_are_compared_in_words(tmp_path: Path) -> None:
    slow = runs(tmp_path, "slow", 1e-5, {0: 2.00, 1: 2.10, 2: 2.05})
    fast = runs(tmp_path, "fast", 1e-4, {0: 1.90, 1: 2.01, 2: 1.95})
    same = runs(tmp_path, "same", 1e-3, {7: 2.02, 8: 2.13})
    comparison = compare_runs([*slow, *fast, *same])
    means = comparison.tables[0]
    assert means.head == [
        "mean over seeds",
        "slow0 (3 seeds)",
        "fast0 (3 seeds)",
        "same7 (2 seeds)",
    ]
    assert means.rows[0][:3] == ["prose", "2.0500 ± 0.0500", "1.9533 ± 0.0551"]
    first, second = comparison.verdicts
    assert first.startswith("prose, fast0 against slow0: -0.0967 ± 0.0033, not noise (p = 0.0012")
    assert "paired t-test" in first
    assert second.startswith("prose, same7 against slow0: +0.0250 ") and "may be noise" in second
    assert "Welch" in second
    text, page = comparison_text(comparison), comparison_page(comparison)
    assert first in text and first in page.replace("&#39;", "'")


def test_a_group_of_one_is_said_to_have_no_spread(tmp_path: Path) -> None:
    folders = runs(tmp_path, "slow", 1e-5, {0: 2.0, 1: 2.1}) + runs(tmp_path, "fast", 1e-4, {0: 1})
    (verdict,) = compare_runs(folders).verdicts
    assert "a group with one seed shows no spread" in verdict
    assert compare_runs([folders[0], folders[2]]).verdicts == []  # no group at all


@pytest.mark.parametrize(
    ("values", "is_paired", "p"),
    [  # from scipy.stats.ttest_rel and ttest_ind(equal_var=False)
        (([1.0, 1.2, 1.1], [1.3, 1.25, 1.5]), True, 0.13827),
        (([1.0, 1.2, 1.1], [1.3, 1.25, 1.5]), False, 0.06381),
        (([1.0, 1.2], [1.0, 1.2]), True, 1.0),
    ],
)
def test_p_is_that_of_the_t_tests(values, is_paired: bool, p: float) -> None:
    assert compare_means(*values, is_paired=is_paired).p == pytest.approx(p, abs=1e-4)
