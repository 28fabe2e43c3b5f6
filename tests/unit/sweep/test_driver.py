"""A sweep's table depends on its settings alone: not on what ends first, nor on kills.

The runs are files that a test writes; tests/distributed/test_sweep.py starts real ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from dtrain.config.sweep import Sweep
from dtrain.core.errors import Exit, UserError
from dtrain.sweep.driver import Driver
from dtrain.sweep.recipes import TrialRecipes
from dtrain.sweep.record import SeedRun, SweepDir, SweepRecord, open_record
from dtrain.sweep.results import table, write_best

EVERY, STEPS = 2, 12
RATE, RANK = "stages.task.train.learning_rate", "stages.task.method.r"


def settings(folder: Path, **more: Any) -> Sweep:
    values = {
        "recipe": "tiny",
        "overrides": ["device=cpu", f"stages.task.train.evaluate_every_steps={EVERY}"],
        "parameters": {RATE: "log(1e-4, 1e-1)", RANK: [2, 4, 8]},
        "search": "random",
        "prune": "median",
        "trials": 9,
        "at_once": 3,
        "folder": str(folder),
    }
    return Sweep(**values | more)


class Killed(BaseException):
    """Ends a driver at once, as SIGKILL does."""


class WrittenRuns:
    """Runs that advance by an evaluation at a time, in a random order."""

    poll_seconds = 0.0

    def __init__(self, folder: SweepDir, capacity: int, order: int) -> None:
        self.folder, self.capacity = folder, capacity
        self.random = random.Random(order)
        self.steps: dict[str, int] = {}
        self.statuses: dict[str, int] = {}
        self.started: list[str] = []
        self.runs: dict[str, SeedRun] = {}

    def start(self, batch: Sequence[SeedRun]) -> None:
        for run in batch:
            assert run.name not in self.steps, "started twice"
            self.steps[run.name] = 0
            self.runs[run.name] = run
            self.started.append(run.name)
            self.folder.run(run.name).exit_report.unlink(missing_ok=True)
        assert len(self.steps) <= self.capacity

    def refresh(self) -> None:
        for name in list(self.steps):
            if self.random.random() < 0.4:
                self._advance(name)

    def _advance(self, name: str) -> None:
        run = self.folder.run(name)
        self.steps[name] += EVERY
        step = self.steps[name]
        if name.startswith("shared"):
            return self._end(name, Exit.FINISHED, "")
        trials = json.loads(self.folder.record.read_text())["trials"]
        parameters = trials[int(name[7:11])]["parameters"]
        rate, rank = parameters[RATE], parameters[RANK]
        if rate > 0.03 and step > 6:
            return self._end(name, Exit.NON_FINITE, "loss was not finite")
        loss = abs(log10(rate) + 2.5) + rank / 50 + 3 / step + self.runs[name].seed / 100
        metrics = run.stage("task").metrics
        metrics.parent.mkdir(exist_ok=True)
        if step < STEPS:
            lines = (
                [json.loads(x) for x in metrics.read_text().splitlines()] if step > EVERY else []
            )
            lines.append({"step": step, "total_steps": STEPS, "held_out": {"task": loss}})
            metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
            return None
        run.evaluation.write_text(json.dumps({"losses": {"task": {"task": loss}}}))
        return self._end(name, Exit.FINISHED, "")

    def _end(self, name: str, status: int, reason: str) -> None:
        outcome = "failed" if status else "finished"
        report = {"outcome": outcome, "status": int(status), "reason": reason}
        self.folder.run(name).exit_report.write_text(json.dumps(report))
        self.statuses[name] = status
        del self.steps[name]

    def ended(self, run: SeedRun) -> int | None:
        return None if run.name in self.steps else self.statuses.get(run.name, Exit.INTERRUPTED)

    def stop(self, run: SeedRun) -> None:
        self.steps.pop(run.name, None)

    def adopt(self, runs: Sequence[SeedRun]) -> list[SeedRun]:
        return []

    def interrupt(self) -> None:
        self.steps.clear()


def work(sweep: Sweep, order: int = 0) -> tuple[SweepRecord, WrittenRuns]:
    folder = SweepDir(Path(sweep.folder))
    recipes = TrialRecipes(sweep, folder)
    record = open_record(folder, sweep, recipes.base)
    runs = WrittenRuns(folder, sweep.at_once, order)
    assert Driver(sweep, folder, recipes, record, runs).run()
    return record, runs


def results(record: SweepRecord) -> list[list[str]]:
    """The table without times."""
    return [row[:-2] + row[-1:] for row in table(record)]


METHODS = [
    {"search": "random", "prune": "median"},
    {"search": "grid", "prune": "off", "trials": 6},
    {"search": "tpe", "prune": "off"},
    {"search": "tpe", "prune": "hyperband", "seeds": 2, "trials": 14},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: " ".join(map(str, m.values())))
def test_table_does_not_depend_on_what_ends_first_or_on_kills(
    method: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = work(settings(tmp_path / "first", **method), order=1)
    second, _ = work(settings(tmp_path / "second", **method), order=2)
    assert results(first) == results(second)
    if method["prune"] != "off":
        assert sum(trial.state == "pruned" for trial in first.trials) >= 1
    write, chance = SweepRecord.write, random.Random(3)

    def killed_at_times(record: SweepRecord, folder: SweepDir) -> None:
        if chance.random() < 0.08:
            raise Killed
        write(record, folder)
        if chance.random() < 0.08:
            raise Killed

    monkeypatch.setattr(SweepRecord, "write", killed_at_times)
    kills = 0
    while True:
        try:
            third, _ = work(settings(tmp_path / "third", **method), order=kills)
            break
        except Killed:
            kills += 1
    assert kills > 1 and results(third) == results(first)


def test_failed_trials_are_recorded_and_end_nothing(tmp_path: Path) -> None:
    record, _ = work(settings(tmp_path, prune="off", seed=4))
    failed = [trial for trial in record.trials if trial.state == "failed"]
    assert failed and all(trial.parameters[RATE] > 0.03 for trial in failed)
    assert {trial.reason for trial in failed} == {"diverged: loss was not finite"}
    assert len(record.trials) == 9 and record.best is not None
    assert [row[-1] for row in table(record)[-len(failed) :]] == [failed[0].reason] * len(failed)


def test_shared_stages_are_trained_once_for_each_seed(tmp_path: Path) -> None:
    sweep = settings(tmp_path, prune="off", seeds=2, trials=3)
    record, runs = work(sweep)
    assert runs.started[:2] == ["shared/seed-0", "shared/seed-1"]
    folder = SweepDir(tmp_path)
    for trial in record.trials:
        if trial.state != "complete":
            continue
        for run in trial.runs:
            recipe = YAML(typ="safe").load(folder.run(run.name).recipe.read_text())
            assert recipe["output"]["reuse"] == str(tmp_path / f"shared/seed-{run.seed}")
            assert recipe["seed"] == run.seed and not recipe["output"]["merge"]
        assert trial.value == pytest.approx(sum(trial.values) / 2)
        assert trial.values[1] - trial.values[0] == pytest.approx(0.01)
    everything = settings(tmp_path / "other", parameters={"model.attention": ["sdpa", "eager"]})
    assert TrialRecipes(everything, folder).shared == []


def test_best_recipe_is_that_of_the_best_trial(tmp_path: Path) -> None:
    sweep = settings(tmp_path, prune="off", trials=5)
    record, _ = work(sweep)
    folder = SweepDir(tmp_path)
    write_best(record, folder, TrialRecipes(sweep, folder))
    recipe = YAML(typ="safe").load(folder.best_recipe.read_text())
    assert record.best is not None
    best = record.trials[record.best]
    assert best.value == min(t.value for t in record.trials if t.value is not None)
    task = recipe["stages"][1]
    assert task["train"]["learning_rate"] == best.parameters[RATE]
    assert task["method"]["r"] == best.parameters[RANK]
    assert recipe["output"]["merge"] and len(recipe["stages"]) == 2
    assert recipe["output"]["folder"] == str(tmp_path / best.runs[0].name)


def test_more_trials_continue_and_other_settings_are_refused(tmp_path: Path) -> None:
    work(settings(tmp_path, trials=3))
    record, runs = work(settings(tmp_path, trials=5))
    assert len(record.trials) == 5
    assert {name for name in runs.started if "trials" in name} == {"trials/0003", "trials/0004"}
    with pytest.raises(UserError, match=r"holds a sweep with another prune"):
        work(settings(tmp_path, trials=5, prune="off"))
    with pytest.raises(UserError, match="at_once"):
        work(settings(tmp_path, trials=5, at_once=2))
    (tmp_path / "sweep.json").write_text('{"trials": 3}')
    with pytest.raises(UserError, match="is not the record of a sweep"):
        work(settings(tmp_path))


def test_budget_in_hours_starts_no_further_run(tmp_path: Path) -> None:
    record, runs = work(settings(tmp_path, max_hours=1e-9))
    assert runs.started == [] and record.trials == []
