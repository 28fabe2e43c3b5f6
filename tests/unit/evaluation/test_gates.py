"""Gates: what passes, what ends the chain, and what may be chance."""

from __future__ import annotations

from typing import Any

import pytest

from dtrain.config.gates import Gate
from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit, UserError
from dtrain.evaluation.gates import check_gates
from dtrain.monitoring.scores import Score, put_scores


def measured(base: float, task: float, blocks: dict[str, list[float]] | None = None) -> Any:
    """The content of evaluation.json with one set."""
    return {
        "models": ["base", "task"],
        "losses": {"general": {"base": base, "task": task}},
        "metrics": {"general": {"base": {"accuracy": 0.8}, "task": {"accuracy": 0.7}}},
        "blocks": {"general": blocks or {}},
    }


def test_an_increase_within_the_limit_passes() -> None:
    gates = {"general": Gate(max_increase=0.05)}
    check_gates(gates, measured(2.0, 2.049), "task")
    check_gates(gates, measured(2.0, 1.5), "task")


def test_an_increase_beyond_it_names_set_figures_and_remedies() -> None:
    with pytest.raises(UserError) as caught:
        check_gates({"general": Gate(max_increase=0.05)}, measured(2.0, 2.06), "task")
    assert caught.value.status == Exit.GATE_FAILED
    text = str(caught.value)
    assert "evaluation.gates.general" in text and "from 2.0000 to 2.0600" in text
    assert "0.05 is allowed" in text and "replay" in text and "learning_rate" in text


@pytest.mark.parametrize(("limit", "passes"), [(0.11, True), (0.09, False)])
def test_a_metric_may_drop_by_its_limit(limit, passes) -> None:
    gates = {"general": Gate(metric="accuracy", max_drop=limit)}
    if passes:
        check_gates(gates, measured(2.0, 2.0), "task")
    else:
        with pytest.raises(UserError, match=r"accuracy of general from 0\.8000 to 0\.7000"):
            check_gates(gates, measured(2.0, 2.0), "task")


def test_an_increase_that_may_be_chance_is_a_warning(capsys) -> None:
    items = [10.0, 10.0, 10.0, 10.0]
    noisy = {"items": items, "base": [20.0] * 4, "task": [10.0, 34.0, 14.0, 26.0]}
    clear = {"items": items, "base": [20.0] * 4, "task": [21.0, 21.1, 20.9, 21.0]}
    gates = {"general": Gate(max_increase=0.05)}
    check_gates(gates, measured(2.0, 2.1, noisy), "task")
    assert "by no more than chance" in capsys.readouterr().out
    with pytest.raises(UserError, match="standard error of the change"):
        check_gates(gates, measured(2.0, 2.1, clear), "task")


def test_what_was_not_measured_is_refused() -> None:
    known = measured(2.0, 2.0)
    with pytest.raises(UserError, match="f1 of base was not measured") as caught:
        check_gates({"general": Gate(metric="f1", max_drop=0.1)}, known, "task")
    assert "metric=loss or accuracy" in str(caught.value)
    del known["losses"]["general"]["base"]
    with pytest.raises(UserError, match="loss of base was not measured"):
        check_gates({"general": Gate(max_increase=0.1)}, known, "task")


def test_check_tells_of_a_gate_without_a_set_or_with_two_limits() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", ["evaluation.gates={prose: {max_increase: 0.1}}"])
    assert "there is no set or task named prose" in str(caught.value)
    assert "use one of domain, task, answers" in str(caught.value)
    for limits in ("{}", "{max_increase: 0.1, max_drop: 0.1}", "{max_increase: -1}"):
        with pytest.raises(UserError, match=r"evaluation\.gates\.task"):
            load_recipe("tiny", [f"evaluation.gates={{task: {limits}}}"])


@pytest.mark.parametrize(("limit", "passes"), [(0.11, True), (0.05, False)])
def test_a_task_is_held_to_its_first_metric(limit, passes) -> None:
    content: dict[str, Any] = {"losses": {}}
    for model, value in (("base", 0.8), ("task", 0.7)):
        metrics = {"acc": Score(value, 0.001), "acc_norm": Score(0.1, 0.001)}
        put_scores(content, model, "quiz", metrics, "rows")
    gates = {"quiz": Gate(max_drop=limit)}
    if passes:
        check_gates(gates, content, "task")
    else:
        with pytest.raises(UserError, match=r"acc of quiz from 0\.8000 to 0\.7000 \(standard"):
            check_gates(gates, content, "task")
    with pytest.raises(UserError, match="acc or acc_norm"):
        check_gates({"quiz": Gate(metric="f1", max_drop=0.1)}, content, "task")


def test_a_drop_of_a_task_that_may_be_chance_is_a_warning(capsys) -> None:
    content: dict[str, Any] = {"losses": {}}
    for model, value in (("base", 0.8), ("task", 0.7)):
        put_scores(content, model, "quiz", {"acc": Score(value, 0.1)}, "rows")
    check_gates({"quiz": Gate(max_drop=0.01)}, content, "task")
    assert "by no more than chance" in capsys.readouterr().out
