"""Which value of the watched set is best, and what a checkpoint records of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.config.train import Train
from dtrain.core.errors import UserError
from dtrain.training import held_out
from dtrain.training.held_out import HeldOutEvaluator, HeldOutResult, check_maximized
from dtrain.training.progress import StageProgress


def objective(*names: str) -> Any:
    return SimpleNamespace(metric_sum_names=names, metrics=lambda sums, weight: dict(sums))


def test_the_highest_metric_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Train(
        global_batch_size=1, steps=9, evaluate_every_steps=1, evaluate_on="pairs",
        maximize="accuracy", early_stopping_patience=2,
    )  # fmt: skip
    measured = iter([(0.7, 0.5), (0.6, 0.8), (0.5, 0.6), (0.4, float("nan"))])  # loss, accuracy

    def evaluate(engine: Any, one: Any) -> HeldOutResult:
        loss, accuracy = next(measured)
        return HeldOutResult(loss, {"accuracy": accuracy}, [], [])

    monkeypatch.setattr(held_out, "evaluate", evaluate)
    dataset = SimpleNamespace(fingerprint="f")
    sets: Any = {"pairs": SimpleNamespace(loader=SimpleNamespace(dataset=dataset))}
    evaluator, stage = HeldOutEvaluator(sets, train), StageProgress()
    records, engine = [], SimpleNamespace(stage=SimpleNamespace(name="pairs"))
    for step in range(1, 5):
        stage.step = step
        evaluator.evaluate(engine, stage)  # type: ignore[arg-type]
        records.append(evaluator.measured(stage))
    assert [record["score"] for record in records] == [-0.5, -0.8, -0.6, None]
    watched = {"set": "pairs", "rows": "f", "metric": "accuracy"}
    assert records[1] == {"held_out_loss": 0.6, "score": -0.8, "watched": watched}
    assert stage.best_held_out == -0.8 and stage.ended_early
    stage.step = 5
    assert evaluator.measured(stage) == {}


def test_a_metric_that_the_set_lacks_is_refused() -> None:
    sets = {"texts": objective(), "pairs": objective("accuracy")}
    settings = {"global_batch_size": 1, "evaluate_on": "pairs"}
    check_maximized(Train(**settings, maximize="accuracy"), sets)
    with pytest.raises(UserError, match="pairs does not report f1") as caught:
        check_maximized(Train(**settings, maximize="f1"), sets)
    assert "accuracy" in caught.value.fix
    with pytest.raises(UserError, match="texts does not report"):
        check_maximized(Train(global_batch_size=1, maximize="accuracy"), sets)
