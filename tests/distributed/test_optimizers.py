"""Optimizers other than AdamW: the same losses under all engines that can, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.engines import ENGINES
from dtrain.config.optimizers import OPTIMIZERS

RECIPE = """
name: optimizers
device: cpu
model: {base: "dtrain:tiny-llama", dtype: float32}
stages:
  - name: task
    kind: cpt
    method: {kind: full}
    data:
      sequence_length: 64
      sources: [{path: "dtrain:tiny-text/domain.jsonl", format: text}]
    train: {global_batch_size: 4, steps: 4, checkpoint_every_steps: 2, learning_rate: 1.0e-3}
output: {folder: runs/optimizers, merge: true}
"""
SETTINGS: dict[str, dict[str, Any]] = {
    "lion": {"learning_rate": 3e-4},
    "lion_8bit": {"learning_rate": 3e-4},
    "schedule_free": {"learning_rate": 3e-3, "lr_scheduler": "constant"},
}
HELD_OUT = (
    '{kind: cpt, sequence_length: 64, sources: [{path: "dtrain:tiny-text/domain-heldout.jsonl"}]}'
)
NEW = [kind for kind in OPTIMIZERS if not kind.startswith(("adamw", "paged"))]


def settings_of(optimizer: str) -> list[str]:
    """Overrides of the recipe."""
    settings = {"optimizer": optimizer} | SETTINGS.get(optimizer, {})
    return [f"stages.task.train.{key}={value}" for key, value in settings.items()]


def train(runs: dict[str, list[str]], folder: Path, zygote: Any) -> dict[str, dict[str, Any]]:
    """What two ranks found, by run."""
    recipe, log = folder / "recipe.yaml", folder / "log"
    recipe.write_text(RECIPE)
    request = {"recipe": str(recipe), "runs": runs, "found": str(folder / "found")}
    zygote.run(2, "methods_worker", [json.dumps(request)], log)
    found: dict[str, dict[str, Any]] = json.loads((folder / "found.0").read_text())
    return found


@pytest.mark.parametrize("optimizer", NEW)
def test_engines_agree_and_resume(optimizer: str, tmp_path: Path, zygote: Any) -> None:
    overrides = settings_of(optimizer)
    needs_whole = OPTIMIZERS[optimizer].whole_parameters
    runs = {
        engine: [*overrides, f"engine.kind={engine}", f"output.folder={tmp_path / engine}"]
        for engine, capabilities in ENGINES.items()
        if capabilities.whole_parameters or not needs_whole
    }
    found = train(runs, tmp_path, zygote)
    assert list(found) == list(runs)
    for engine, facts in found.items():
        assert facts["resumes"], f"{engine}: other weights or losses after a resume"
        assert facts["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-5), engine
        assert facts["losses"][-1] < facts["losses"][0] - 0.05, "nothing was learned"


def test_what_schedule_free_averages_is_evaluated_and_merged(tmp_path: Path, zygote: Any) -> None:
    evaluated = [f"evaluation={{sets: {{held: {HELD_OUT}}}}}", "output.merge=true"]
    overrides = settings_of("schedule_free")
    during = [*overrides, *evaluated, "stages.task.train.evaluate_every_steps=1"]
    runs = {engine: [*during, f"engine.kind={engine}"] for engine in ENGINES}
    runs["alone"] = [*overrides, "engine.kind=ddp"]
    runs["merged"] = [*evaluated, "engine.kind=ddp", f"model.base={tmp_path / 'ddp/task/merged'}"]
    for name, run in runs.items():
        run.append(f"output.folder={tmp_path / name}")
    found = train(runs, tmp_path, zygote)
    held = {
        name: json.loads((tmp_path / name / "evaluation.json").read_text())["losses"]["held"]
        for name in (*ENGINES, "merged")
    }
    for engine in ENGINES:
        assert found[engine]["resumes"], f"{engine}: other weights or losses after a resume"
        assert held[engine]["task"] == pytest.approx(held["merged"]["base"], rel=1e-5), engine
    assert found["ddp"]["losses"] == found["alone"]["losses"], "an evaluation changed the training"
