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
RATES = {"lion": 3e-4, "lion_8bit": 3e-4}
NEW = [kind for kind in OPTIMIZERS if not kind.startswith(("adamw", "paged"))]


@pytest.mark.parametrize("optimizer", NEW)
def test_engines_agree_and_resume(optimizer: str, tmp_path: Path, zygote: Any) -> None:
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe.write_text(RECIPE)
    settings = {"optimizer": optimizer, "learning_rate": RATES.get(optimizer, 1e-3)}
    overrides = [f"stages.task.train.{key}={value}" for key, value in settings.items()]
    needs_whole = OPTIMIZERS[optimizer].whole_parameters
    runs = {
        engine: [*overrides, f"engine.kind={engine}", f"output.folder={tmp_path / engine}"]
        for engine, capabilities in ENGINES.items()
        if capabilities.whole_parameters or not needs_whole
    }
    request = {"recipe": str(recipe), "runs": runs, "found": str(tmp_path / "found")}
    pids = zygote.start(2, "methods_worker", [json.dumps(request)], log)
    statuses = [zygote.ask(wait=pid) for pid in pids]
    assert not any(statuses), log.read_text()[-6000:]
    found = json.loads((tmp_path / "found.0").read_text())
    assert list(found) == list(runs)
    for engine, facts in found.items():
        assert facts["resumes"], f"{engine}: other weights or losses after a resume"
        assert facts["losses"] == pytest.approx(found["ddp"]["losses"], rel=1e-5), engine
        assert facts["losses"][-1] < facts["losses"][0] - 0.05, "nothing was learned"
