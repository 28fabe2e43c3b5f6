"""TRL's SFTTrainer as oracle: the same rows, order and first adapter give the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import store_folder
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.models.hub import base_folder
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.objectives.causal_lm import SupervisedFinetuning

SFT = SupervisedFinetuning.dataset

ROOT = Path(__file__).parents[2]
STEPS, BATCH, MICRO = 8, 4, 2
STAGE = (
    "stages=[{name: task, kind: sft, method: {kind: lora, r: 4, dropout: 0.0},"
    " data: {sequence_length: 128, packing: false,"
    " sources: [{path: 'dtrain:tiny-text/task.json', format: alpaca}]},"
    f" train: {{global_batch_size: {BATCH}, micro_batch_size: {MICRO}, steps: {STEPS},"
    " learning_rate: 0.01, lr_scheduler: linear, warmup_ratio: 0.0, max_grad_norm: 1.0}}]"
)
LOSS_TOLERANCE = 1e-4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of one SFT stage."""
    command = [sys.executable, "-m", "dtrain.train", "tiny", STAGE, "evaluation={}"]
    folder = tmp_path / "run"
    subprocess.run([*command, f"output.folder={folder}"], cwd=ROOT, check=True, timeout=240)
    return folder


def tokenized_rows(recipe: Recipe) -> Dataset:
    """The rows of a run in the order of its training."""
    stage, base = recipe.stages[0], base_folder(recipe.model.base)
    tokenizer = load_tokenizer(base)
    store = store_folder()
    dataset = prepare(stage.data, SFT, tokenizer, tokenizer_fingerprint(tokenizer), store)
    loader = Loader(dataset, seed=recipe.seed, global_batch=BATCH, total_sequences=STEPS * BATCH)
    rows = [dataset.sequence(int(n)) for step in range(STEPS) for n in loader.batch(step)]
    return Dataset.from_dict(
        {
            "input_ids": [row.input_ids.tolist() for row in rows],
            "completion_mask": [row.is_target.astype(int).tolist() for row in rows],
        }
    )


def test_losses_equal_those_of_trl(run: Path, train_with_trl) -> None:
    lines = (run / "task" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]
    recipe = load_recipe(str(run / "recipe.yaml"))
    rows = tokenized_rows(recipe)
    steps = train_with_trl(recipe, rows, SFTTrainer, SFTConfig, completion_only_loss=True)
    theirs = [step["loss"] for step in steps]
    print("\n".join(f"{a:.6f} {b:.6f}" for a, b in zip(ours, theirs, strict=True)))
    assert ours == pytest.approx(theirs, abs=LOSS_TOLERANCE)
    assert ours[-1] < ours[0] - 0.5, "the loss did not fall: the comparison would prove nothing"
