"""A wrong sweep is refused before its first trial, with the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dtrain.config.sweep import Choices, Range, load_sweep, parse_option
from dtrain.core.errors import UserError

RATE = "stages.task.train.learning_rate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages.tsk.train.steps": [1]}, "did you mean task?"),
        ({"stages.task.train.learning_rte": [0.1]}, "did you mean learning_rate?"),
        ({"stages.task.learning_rate": [0.1]}, "use stages[].train.learning_rate"),
        ({RATE: [0.1, -0.1]}, "must be more than 0, not -0.1"),
        ({RATE: ["fast"]}, "must be a number, not 'fast'"),
        ({"stages.task.method.r": "log(1, 64)"}, "must be a whole number, not 1.0"),
        ({"stages.task.train.warmup_ratio": "uniform(0, 2)"}, "must be at most 1, not 2.0"),
        ({RATE: "log(0, 1)"}, "is an empty range"),
        ({RATE: "log(1, 0.1)"}, "is an empty range"),
        ({RATE: "lgo(0.1, 1)"}, "is not a range of values"),
        ({RATE: []}, "is an empty list"),
        ({"seed": [1, 2]}, "use seeds"),
        ({"output.folder": ["a", "b"]}, "cannot be searched"),
    ],
)
def test_wrong_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_sweep("tiny", {"parameters": options})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": "medain"}, "did you mean median?"),
        ({"evaluate_on": "tsk"}, "did you mean task?"),
        ({"stage": "domian"}, "did you mean domain?"),
        ({"trials": 1}, "2 combinations need more than 1 trials"),
        ({"max_gpu_hours": 2.0}, "the recipe trains on CPUs"),
    ],
)
def test_wrong_keys_are_refused(options: dict[str, Any], message: str) -> None:
    values = {"parameters": {RATE: [0.1, 0.2]}, **options}
    with pytest.raises(UserError) as refused:
        load_sweep("tiny", values, ["device=cpu"])
    assert message in str(refused.value)


def test_pruning_without_evaluations_is_refused() -> None:
    values = {"parameters": {RATE: [0.1]}, "prune": "median"}
    overrides = [f"stages.task.train.{key}=null" for key in ("evaluate_every_steps", "evaluate_on")]
    with pytest.raises(UserError, match="pruning needs evaluations"):
        load_sweep("tiny", values, overrides)
    load_sweep("tiny", values | {"evaluate_on": "training"}, overrides)


def test_file_and_options_are_combined(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"recipe: tiny\nserch: tpe\nparameters: {{{RATE}: 'log(1e-4, 1e-2)'}}\n")
    with pytest.raises(UserError) as refused:
        load_sweep(str(file), {})
    assert f"{file}:2: serch: unknown key\n    → did you mean search?" in str(refused.value)
    file.write_text(file.read_text().replace("serch", "search"))
    grid = dict([parse_option("stages.task.method.r=4,8", is_list=True)])
    sweep = load_sweep(str(file), {"parameters": grid, "trials": 7}, ["seed=3"])
    assert sweep.space == {
        RATE: Range("log", 1e-4, 1e-2),
        "stages.task.method.r": Choices((4, 8)),
    }
    assert (sweep.method, sweep.number_of_trials) == ("tpe", 7)
    assert sweep.recipe_of({RATE: 0.5}).seed == 3
    assert sweep.recipe_of({RATE: 0.5}).stages[1].train.learning_rate == 0.5
