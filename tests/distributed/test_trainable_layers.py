"""Training of some parameters: what trains, is saved and is merged, under every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtrain.config.engines import ENGINES

RECIPE = """
name: layers
device: cpu
model: {base: "dtrain:tiny-llama", dtype: DTYPE}
stages:
  - name: task
    kind: cpt
    method: {kind: full, trainable_layers: 1, frozen_modules: [k_proj, ".*norm"]}
    data:
      sequence_length: 64
      sources: [{path: "dtrain:tiny-text/domain.jsonl", format: text}]
    train: {global_batch_size: 4, steps: 4, checkpoint_every_steps: 2, learning_rate: 1.0e-3}
output: {folder: runs/layers, merge: true}
"""
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_some_of_the_last_layer_under_every_engine(dtype: str, tmp_path: Path, zygote: Any) -> None:
    recipe, log = tmp_path / "recipe.yaml", tmp_path / "log"
    recipe.write_text(RECIPE.replace("DTYPE", dtype))
    runs = {
        engine: [f"engine.kind={engine}", f"output.folder={tmp_path / engine}"]
        for engine in ENGINES
    }
    request = {"recipe": str(recipe), "runs": runs, "found": str(tmp_path / "found")}
    zygote.run(2, "methods_worker", [json.dumps(request)], log)
    found = json.loads((tmp_path / "found.0").read_text())
    assert list(found) == list(ENGINES)
    losses = found["ddp"]["losses"]
    assert losses[-1] < losses[0] - 0.02, "nothing was learned"
    lineage = json.loads((tmp_path / "ddp" / "lineage.json").read_text())
    base = load_file(Path(lineage["base"]["path"]) / "model.safetensors")
    for engine, facts in found.items():
        assert facts["resumes"], engine
        assert facts["losses"] == pytest.approx(losses, rel=TOLERANCE[dtype]), engine
        merged = load_file(tmp_path / engine / "task/merged/model.safetensors")
        changed = {name for name in base if not torch.equal(base[name], merged[name])}
        trained = {n for n in base if n.startswith("model.layers.1.") and "norm" not in n}
        assert changed == {n for n in trained if "k_proj" not in n}, engine
