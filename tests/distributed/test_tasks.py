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


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = write_task(tmp_path / "tasks", "choice", CHOICE)
    write_task(folder, "rolling", ROLLING)
    return write_task(folder, "answer", ANSWER)


def test_scores_are_those_of_the_harness_on_any_ranks_and_engine(start_ranks, tasks, tmp_path):
    settings = (
        f"evaluation={{sets: {{}}, tasks: {{names: [choice, rolling, answer], include_path: {tasks}"
        ", num_fewshot: 2, limit: 7, seed: 7, batch_size: 3, every_steps: 4}}"
    )
    runs = {
        name: start_ranks(*SHORT, settings, f"engine.kind={engine}", ranks=ranks, folder=name,
                          evaluates=False).wait(0)
        for name, engine, ranks in [("ddp-1", "ddp", 1), ("fsdp2-2", "fsdp2", 2),
                                    ("zero3-2", "zero3", 2)]
    }  # fmt: skip
    first = runs["ddp-1"].json("evaluation.json")["scores"]
    assert list(first) == ["base", "domain", "task"]
    for run in runs.values():
        scores = run.json("evaluation.json")["scores"]
        for model, by_name in first.items():
            for name, metrics in by_name.items():
                for metric, score in metrics.items():
                    other = scores[model][name][metric]
                    expected = pytest.approx(score["value"], rel=1e-4)
                    assert other["value"] == expected, (run.folder.name, model, name, metric)
    during = [line["scores"] for line in runs["fsdp2-2"].records("task") if "scores" in line]
    assert [list(scores) for scores in during] == [["choice", "rolling", "answer"]]
    merged = runs["zero3-2"].folder / "task" / "merged"
    command = [sys.executable, "-c", ALONE, str(merged), str(tasks)]
    alone = json.loads(
        subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1]
    )
    for name, metrics in first["task"].items():
        for metric, score in metrics.items():
            assert score["value"] == pytest.approx(alone[name][f"{metric},none"], rel=1e-4)
            error = alone[name][f"{metric}_stderr,none"]
            assert score["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-4))
    assert first["task"]["rolling"] != first["base"]["rolling"]
