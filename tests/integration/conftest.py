"""TRL's trainers with the settings of a dtrain stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from dtrain.config.schema import Recipe
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.models.load import load_base
from dtrain.models.tokenizer import load_tokenizer


class StepMetrics(TrainerCallback):
    """Collects the metrics of each step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **more):
        if "loss" in logs:
            self.lines.append({key: float(value) for key, value in logs.items()})


@pytest.fixture
def train_with_trl(tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """Train a recipe's first stage with TRL on tokenized rows, from the same first adapter."""

    def train(
        recipe: Recipe, rows: Dataset, trainer: type, config: type, **options: Any
    ) -> list[dict[str, float]]:
        stage, base = recipe.stages[0], base_folder(recipe.model.base)
        cpu = torch.device("cpu")
        model = load_base(base, recipe.model, quantized=False, dtype=torch.float32, device=cpu)
        model.set_attn_implementation("sdpa")
        metrics, settings = StepMetrics(), stage.train
        arguments = config(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.global_batch_size // settings.micro_batch,
            max_steps=settings.steps,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            train_sampling_strategy="sequential",
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **options,
        )
        trainer(
            model=build_method(stage.method).attach(model, seed=recipe.seed),
            args=arguments,
            train_dataset=rows,
            processing_class=load_tokenizer(base),
            callbacks=[metrics],
        ).train()
        return metrics.lines

    return train
