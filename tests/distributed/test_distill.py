"""Distillation gives the same losses and metrics under every engine, rank count and batch.

The golden file has loss, gradient norm and metrics of every step, then those of the held-out set.
To write it again after a change that is meant to change it: `DTRAIN_WRITE_GOLDEN=1 pytest
tests/distributed/test_distill.py -k one_rank`.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.samples.make import ensure

SETTINGS = {"temperature": 2.0, "ce_weight": 0.1}
Start = Callable[..., Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model with the tokenizer of `tiny-llama`, whose vocabulary is padded more."""
    folder = tmp_path_factory.mktemp("teacher")
    for file in ensure("tiny-llama").iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=576, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        )
    )  # fmt: skip
    stream = np.random.default_rng(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                values = stream.uniform(-0.35, 0.35, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(values))
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(0.3 * embeddings + 0.7 * embeddings[:1])  # alike: easy to learn
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def start_distill(start_stage, teacher) -> Start:
    """start_distill(overrides of the stage, …) → ranks of a run of one stage of distillation."""

    def start(
        *overrides: str, distill: dict[str, Any] = SETTINGS, dropout: float = 0.0, **more: Any
    ) -> Any:
        train, held_out = (
            [{"path": f"dtrain:tiny-text/{f}.json"}] for f in ("task", "task-heldout")
        )
        stage = {
            "kind": "distill",
            "method": {"kind": "lora", "r": 4, "alpha": 8, "dropout": dropout},
            "data": {"sequence_length": 128, "sources": train},
            "distill": {"teacher": str(teacher), **distill},
        }
        return start_stage(stage, held_out, *overrides, **more)

    return start


@pytest.fixture(scope="module")
def alone() -> list[list[float]]:
    """The figures of one rank, once they are known."""
    return []


def test_one_rank_learns_from_the_teacher(start_distill, alone) -> None:
    run = start_distill(ranks=1).wait(0)
    alone += run.figures()
    run.assert_golden_figures("distill")
    for loss, _, divergence, cross_entropy in alone[:-2]:
        assert loss == pytest.approx(0.9 * 4 * divergence + 0.1 * cross_entropy, rel=1e-6)
    assert alone[-1][1] < 0.8 * alone[-2][1], "held-out divergence: nothing was learned"


@pytest.mark.parametrize(
    ("engine", "micro"), [("ddp", 2), ("fsdp2", 1), ("zero2", 1), ("zero3", 2)]
)
def test_engines_ranks_and_micro_batches(start_distill, alone, engine, micro) -> None:
    options = [f"engine.kind={engine}"]
    run = start_distill(f"train.micro_batch_size={micro}", options=options).wait(0)
    run.assert_figures(alone or start_distill(ranks=1, folder="alone").wait(0).figures())
    kept = "sharded over the ranks" if engine in ("fsdp2", "zero3") else "whole on every rank"
    assert kept in run.output


def test_the_model_without_its_adapter_is_a_teacher(start_distill) -> None:
    """Under an engine that shards it; with and without kernels."""
    itself = {"teacher": "base", "loss": "reverse_kl", "ce_weight": 0.5}
    run = start_distill(distill=itself, options=["engine.kind=zero3"]).wait(0)
    options = {"ranks": 1, "folder": "plain", "options": ["model.kernels=off"]}
    plain = start_distill(distill=itself, **options).wait(0)
    run.assert_figures(plain.figures(), rel=2e-5, abs=2e-5)
    first, *_, before, after = run.figures()
    assert first[2] == before[1] == 0, "it starts as its teacher"
    assert after[1] > 0 and after[2] < before[2]


def test_stored_likeliest_tokens(start_distill, alone) -> None:
    """All tokens are the teacher itself; the values are computed once, and nothing else changes."""
    everything = SETTINGS | {"top_k": 512}
    run = start_distill(distill=everything, options=["engine.kind=fsdp2"]).wait(0)
    run.assert_figures(alone or start_distill(ranks=1, folder="a").wait(0).figures())
    assert "computing values" in run.output
    few = SETTINGS | {"top_k": 8}
    run = start_distill("train.micro_batch_size=2", distill=few, folder="few").wait(0)
    again = start_distill(distill=few, folder="again", ranks=1).wait(0)
    assert "computing values" in run.output and "computing values" not in again.output
    again.assert_figures(run.figures())
    assert run.figures()[-1][1] < 0.8 * run.figures()[-2][1]


def test_a_model_that_trains_whole_has_its_start_as_a_teacher(start_distill) -> None:
    itself = {"teacher": "base", "top_k": 16, "ce_weight": 0.5}
    overrides = "method={kind: full}", "train.learning_rate=0.001"
    run = start_distill(*overrides, distill=itself, options=["engine.kind=zero3"]).wait(0)
    *_, before, after = run.figures()
    assert "computing values" in run.output and after[2] < before[2]


def test_killed_it_ends_at_the_same_weights(start_distill, weights) -> None:
    mixed = SETTINGS | {"loss": "jsd", "beta": 0.3}
    settings = {"distill": mixed, "dropout": 0.1, "ranks": 1}
    undisturbed = start_distill(folder="undisturbed", **settings).wait(0)
    third_save = "task/checkpoints/step-000003"
    killed = start_distill("train.checkpoint_every_steps=1", dies_at=third_save, **settings)
    killed.wait(-signal.SIGKILL)
    run = start_distill("train.checkpoint_every_steps=1", **settings).wait(0)
    assert "resuming from step" in run.output
    assert run.figures() == undisturbed.figures()
    assert weights(run.folder) == weights(undisturbed.folder)


def test_another_teacher_is_refused_on_resume(start_distill, teacher, tmp_path) -> None:
    start_distill(ranks=1).wait(0)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    run = start_distill(ranks=1, options=[f"stages.task.distill.teacher={moved}"]).wait(0)
    assert "already complete" in run.output
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(
        json.dumps(config | {"rope_theta": 500.0, "rms_norm_eps": 1e-3})
    )
    run = start_distill(ranks=1, options=[f"stages.task.distill.teacher={moved}"]).wait(2)
    assert "distill.teacher" in run.output
