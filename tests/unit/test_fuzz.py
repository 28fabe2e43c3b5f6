"""Mutated files for their readers, a few seconds' worth of `tests/faults/fuzz.py`."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.core.run_dir import RunDir
from dtrain.launching.attempts import read_attempts
from dtrain.launching.status import attempt_line, log_of
from dtrain.merge.verify import verify_model
from dtrain.models.peft_format import read_adapter_config
from dtrain.monitoring.run_record import run_summary
from dtrain.monitoring.run_state import read_state
from dtrain.planning.architectures import read_config, shape_of
from dtrain.recipes import shipped

CASES = 25  # of each file

_PATH = Path(__file__).parents[1] / "faults" / "mutations.py"
_SPEC: Any = importlib.util.spec_from_file_location("mutations", _PATH)
mutations = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutations)

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 128, "vocab_size": 512, "rope_scaling": {"factor": 2.0},
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2},
           "target_modules": ["q_proj"]}  # fmt: skip
ATTEMPT = {"number": 1, "job": "17", "restart": 0, "nodes": ["a"], "log": "run/job.log",
           "started": 1.7e9, "ended": 1.7e9 + 9, "progress": {"domain": "complete"}}  # fmt: skip
LINEAGE = {"name": "x", "base": {"path": "base", "identity": "ab"},
           "artifacts": [{"name": "domain", "steps": 2, "seconds": 1.5}]}  # fmt: skip
BLOCKS = {"items": [2.0, 2.0], "base": [6.0, 6.1], "domain": [5.0, 5.1]}
SCORE = {"value": 0.5, "stderr": 0.1, "blocks": [1.0, 0.0], "items": [1.0, 1.0]}
EVALUATION = {
    "models": ["base", "domain"], "losses": {"held": {"base": 3.0, "domain": 2.5}},
    "blocks": {"held": BLOCKS}, "metrics": {"held": {"base": {"perplexity": 20.0}}},
    "scores": {"base": {"ask": {"f1": SCORE}}, "domain": {"ask": {"f1": SCORE}}},
}  # fmt: skip
METRICS = [
    {"step": step, "total_steps": 2, "loss": 3.0 - step, "tokens": 9, "tokens_per_second": 5.0,
     "time": 1.7e9 + step, "seconds": {"data": 0.1}, "held_out": {"held": 2.0},
     "sources": {"a": {"loss": 1.0, "tokens": 4, "supervised_tokens": 4}}}
    for step in (1, 2)
]  # fmt: skip
ANSWER = {"set": "ask", "prompt": "What?", "reference": "A.", "answer": "B.", "scores": {"f1": 0.5}}
START = {"started": 1.7e9, "host": "a", "nodes": 1, "ranks": 2, "device": "cpu"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files of every kind."""
    run = tmp_path / "run"
    for name, content in {
        "config.json": LLAMA,
        "adapter_config.json": ADAPTER,
        "run/slurm/attempts.json": [ATTEMPT],
        "run/lineage.json": LINEAGE,
        "run/evaluation.json": EVALUATION,
        "run/outcome.json": {"outcome": "finished", "status": 0, "reason": ""},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    for name, lines in {
        "run/domain/metrics.jsonl": METRICS,
        "run/predictions/base.jsonl": [ANSWER],
        "run/starts.jsonl": [START],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.yaml").write_text(shipped()["tiny"].read_text())
    (run / "recipe.yaml").write_text("name: x\nstages: [{name: domain, kind: cpt}]\n")
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def _look_at_run(run: Path) -> None:
    run_summary(run)
    read_state(run)


def _look_at_attempts(run: Path) -> None:
    log_of(run)
    for attempt in read_attempts(RunDir(run)):
        attempt_line(attempt)


def _plan(folder: Path) -> None:
    shape_of(read_config(folder / "config.json"), "config.json")


READERS: dict[str, Callable[[Path], Any]] = {
    "recipe.yaml": lambda folder: load_recipe(str(folder / "recipe.yaml")),
    "config.json": _plan,
    "adapter_config.json": read_adapter_config,
    "model.safetensors": verify_model,
    "run/slurm/attempts.json": lambda folder: _look_at_attempts(folder / "run"),
    **{
        f"run/{name}": lambda folder: _look_at_run(folder / "run")
        for name in ("recipe.yaml", "lineage.json", "evaluation.json", "outcome.json",
                     "starts.jsonl", "domain/metrics.jsonl", "predictions/base.jsonl")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_or_refused(folder: Path, name: str) -> None:
    path, read = folder / name, READERS[name]
    read(folder)
    original = path.read_bytes()
    for number in range(CASES):
        path.write_bytes(mutations.mutate(path, random.Random(f"{name} {number}")))
        try:
            read(folder)
        except UserError:
            pass
        except Exception as error:
            pytest.fail(
                f"{type(error).__name__}: {error}, case {number}: {path.read_bytes()!r:.500}"
            )
        path.write_bytes(original)
