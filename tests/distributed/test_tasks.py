"""Scores on tasks: those of the harness itself, on any number of ranks, under any engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.task_files import ANSWER, CHOICE, ROLLING, write_task

# The harness alone, on a folder of a model.
ALONE = """\
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1:]
results = simple_evaluate(
    model="hf",
    model_args={"pretrained": folder, "dtype": "float32"},
    tasks=["choice", "rolling", "answer"],
    num_fewshot=2,
    limit=7,
    batch_size=3,
    device="cpu",
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    bootstrap_iters=1000,
    random_seed=7, numpy_random_seed=7, torch_random_seed=7, fewshot_random_seed=7,
)
print(json.dumps(results["results"]))
"""
SHORT = [
    "stages.domain.method={kind: full}",  # the model itself is what the engine wraps
    "stages.domain.train.learning_rate=1e-3",
    "stages.domain.train.steps=4",
    "stages.task.train.steps=5",
]
NAMES = ["choice", "rolling", "answer"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = write_task(tmp_path / "tasks", "choice", CHOICE)
    write_task(folder, "rolling", ROLLING)
    return write_task(folder, "answer", ANSWER)


def test_scores_are_those_of_the_harness_on_any_ranks_and_engine(start_ranks, tasks):
    def run(engine: str, ranks: int, *overrides: str):
        settings = f"names: {NAMES}, include_path: {tasks}, num_fewshot: 2, limit: 7, seed: 7"
        evaluation = f"evaluation={{sets: {{}}, tasks: {{{settings}, batch_size: 3}}}}"
        arguments = [*SHORT, evaluation, f"engine.kind={engine}", *overrides]
        return start_ranks(*arguments, ranks=ranks, folder=engine, evaluates=False).wait(0)

    alone = run("ddp", 1)
    sharded = [run("fsdp2", 2, "evaluation.tasks.every_steps=4"), run("zero3", 2)]
    first = alone.json("evaluation.json")["scores"]
    assert list(first) == ["base", "domain", "task"]
    assert first["task"]["rolling"] != first["base"]["rolling"]
    losses = [float(line.split()[2]) for line in alone.losses()]
    for other in sharded:
        scores = other.json("evaluation.json")["scores"]
        for key, score in values(first).items():
            assert values(scores)[key] == pytest.approx(score, rel=1e-4), (other.folder.name, key)
        assert [float(line.split()[2]) for line in other.losses()] == pytest.approx(
            losses, abs=2e-5
        )
    during = [line["scores"] for line in sharded[0].records("task") if "scores" in line]
    assert [list(by_name) for by_name in during] == [NAMES]
    results = harness_alone(sharded[1].folder / "task" / "merged", tasks)
    for name, metrics in first["task"].items():
        for metric, score in metrics.items():
            assert score["value"] == pytest.approx(results[name][f"{metric},none"], rel=1e-4)
            error = results[name][f"{metric}_stderr,none"]
            assert score["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-4))


def values(scores: dict) -> dict[tuple[str, str, str], float]:
    """The values of scores by model, name and metric."""
    return {
        (model, name, metric): score["value"]
        for model, by_name in scores.items()
        for name, metrics in by_name.items()
        for metric, score in metrics.items()
    }


def harness_alone(model: Path, tasks: Path) -> dict:
    """The results of the harness's own model of a folder."""
    command = [sys.executable, "-c", ALONE, str(model), str(tasks)]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return json.loads(output.splitlines()[-1])
