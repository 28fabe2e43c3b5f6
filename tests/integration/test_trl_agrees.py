"""TRL's SFTTrainer as oracle: the same rows, order and first adapter give the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from dtrain.config.load import load_recipe
from dtrain.core.cache_paths import cache_folder
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.models.load import load_base
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


class Losses(TrainerCallback):
    """What the trainer logs."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args, state, control, logs=None, **more):
        if "loss" in logs:
            self.values.append(float(logs["loss"]))


def train_with_trl(run: Path, out: Path) -> list[float]:
    recipe = load_recipe(str(run / "recipe.yaml"))
    stage, base = recipe.stages[0], base_folder(recipe.model.base)
    tokenizer = load_tokenizer(base)
    store = cache_folder() / "stores"
    dataset = prepare(stage.data, SFT, tokenizer, tokenizer_fingerprint(tokenizer), store)
    loader = Loader(dataset, seed=recipe.seed, global_batch=BATCH, total_sequences=STEPS * BATCH)
    rows = [dataset.sequence(int(n)) for step in range(STEPS) for n in loader.batch(step)]
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids.tolist() for row in rows],
            "completion_mask": [row.is_target.astype(int).tolist() for row in rows],
        }
    )
    cpu = torch.device("cpu")
    model = load_base(base, recipe.model, quantized=False, dtype=torch.float32, device=cpu)
    model.set_attn_implementation("sdpa")
    losses = Losses()
    arguments = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        max_steps=STEPS,
        learning_rate=stage.train.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=stage.train.weight_decay,
        max_grad_norm=stage.train.max_grad_norm,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=build_method(stage.method).attach(model, seed=recipe.seed),
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[losses],
    )
    trainer.train()
    return losses.values


def test_losses_equal_those_of_trl(run: Path, tmp_path: Path) -> None:
    lines = (run / "task" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]
    theirs = train_with_trl(run, tmp_path / "trl")
    print("\n".join(f"{a:.6f} {b:.6f}" for a, b in zip(ours, theirs, strict=True)))
    assert ours == pytest.approx(theirs, abs=LOSS_TOLERANCE)
    assert ours[-1] < ours[0] - 0.5, "the loss did not fall: the comparison would prove nothing"
