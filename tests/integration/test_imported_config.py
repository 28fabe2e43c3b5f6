"""A config of another tool trains, as `dtrain import` writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dtrain import run
from dtrain.importing.import_config import import_config, recipe_text

CONFIGS = Path(__file__).parents[1] / "unit" / "importing" / "configs" / "llama_factory"


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_an_imported_config_trains_five_steps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(CONFIGS, tmp_path / "theirs")
    asked = [f"What is {n} and {n}?" for n in range(12)]
    alpaca = [{"instruction": q, "input": "", "output": f"It is {q[8]}."} for q in asked]
    chats = [[{"from": "human", "value": q}, {"from": "gpt", "value": "Yes."}] for q in asked]
    write_rows(tmp_path / "theirs" / "data" / "alpaca.jsonl", alpaca)
    write_rows(tmp_path / "theirs" / "data" / "chats.jsonl", [{"turns": talk} for talk in chats])
    (tmp_path / "recipe.yaml").write_text(
        recipe_text(import_config(Path("theirs/lora_sft.yaml"), 1)), "utf-8"
    )
    result = run("recipe.yaml", ["device=cpu", "stages.sft.train.learning_rate=1.0e-2"])
    steps = [row for row in result.metrics("sft") if "loss" in row]
    assert len(steps) == 5 and steps[-1]["loss"] < steps[0]["loss"]
    base, trained = [row["loss"] for row in result.losses()]
    assert trained < base
    assert result.model is None  # the tool leaves the adapter
    assert (result.folder / "sft" / "adapter" / "adapter_model.safetensors").exists()
