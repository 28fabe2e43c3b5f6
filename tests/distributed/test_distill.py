"""Distillation gives the same losses and metrics under every engine, rank count and batch.

The golden file has loss, gradient norm and metrics of every step, then those of the held-out set.
To write it again after a change that is meant to change it: `DTRAIN_WRITE_GOLDEN=1 pytest
tests/distributed/test_distill.py -k one_rank`.
"""

from __future__ import annotations

import json
import os
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

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-distill.txt"
TOLERANCE = {"rel": 2e-6, "abs": 2e-6}  # of runs on one machine
GOLDEN_TOLERANCE = {"rel": 2e-4, "abs": 2e-5}
SETTINGS = "temperature: 2.0, ce_weight: 0.1"
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
def start_stage(start_ranks, teacher) -> Start:
    """start_stage(overrides of the stage, …) → ranks of a run of one stage of distillation."""

    def start(
        *overrides: str,
        distill: str = SETTINGS,
        own: bool = False,
        dropout: float = 0.0,
        **more: Any,
    ) -> Any:
        group = f"{{teacher: {'base' if own else teacher}, {distill}}}"
        rows = 'sources: [{path: "dtrain:tiny-text/task.json"}], sequence_length: 128'
        method = f"{{kind: lora, r: 4, alpha: 8, dropout: {dropout}}}"
        train = "{global_batch_size: 4, steps: 5, learning_rate: 0.01}"
        stage = f"{{name: task, kind: distill, method: {method}, data: {{{rows}}}, train: {train}"
        held_out = rows.replace("task.json", "task-heldout.json")
        return start_ranks(
            f"stages=[{stage}, distill: {group}}}]",
            f"evaluation={{sets: {{rows: {{kind: distill, {held_out}, distill: {group}}}}}}}",
            *(f"stages.task.{override}" for override in overrides),
            **more,
        )

    return start


def figures(run: Any) -> list[list[float]]:
    """Loss, gradient norm and metrics of each step, then those of the held-out set."""
    steps = [
        [record["loss"], record["grad_norm"], *record["metrics"].values()]
        for record in run.records("task")
        if "loss" in record
    ]
    known = run.json("evaluation.json")
    for model in ("base", "task"):
        steps.append([known["losses"]["rows"][model], *known["metrics"]["rows"][model].values()])
    return steps


def assert_same(found: list[list[float]], expected: list[list[float]], **tolerance: float) -> None:
    assert len(found) == len(expected)
    for step, right in zip(found, expected, strict=True):
        assert step == pytest.approx(right, **(tolerance or TOLERANCE))


@pytest.fixture(scope="module")
def alone() -> list[list[float]]:
    """The figures of one rank, once they are known."""
    return []


def test_one_rank_learns_from_the_teacher(start_stage, alone) -> None:
    run = start_stage(ranks=1).wait(0)
    alone += figures(run)
    if "DTRAIN_WRITE_GOLDEN" in os.environ:
        lines = [" ".join(f"{number:.6f}" for number in step) for step in alone]
        GOLDEN.write_text("\n".join(lines) + "\n")
    golden = [[float(n) for n in line.split()] for line in GOLDEN.read_text().splitlines()]
    assert_same(alone, golden, **GOLDEN_TOLERANCE)
    for loss, _, divergence, cross_entropy in alone[:-2]:
        assert loss == pytest.approx(0.9 * 4 * divergence + 0.1 * cross_entropy, rel=1e-6)
    assert alone[-1][1] < 0.8 * alone[-2][1], "held-out divergence: nothing was learned"


@pytest.mark.parametrize(
    ("engine", "micro"), [("ddp", 2), ("fsdp2", 1), ("zero2", 1), ("zero3", 2)]
)
def test_engines_ranks_and_micro_batches(start_stage, alone, engine, micro) -> None:
    options = [f"engine.kind={engine}", f"stages.task.train.micro_batch_size={micro}"]
    run = start_stage(options=options).wait(0)
    assert_same(figures(run), alone or figures(start_stage(ranks=1, folder="alone").wait(0)))
    kept = "sharded over the ranks" if engine in ("fsdp2", "zero3") else "whole on every rank"
    assert kept in run.output


def test_the_model_without_its_adapter_is_a_teacher(start_stage) -> None:
    """Under an engine that shards it; with and without kernels."""
    settings = {"distill": "loss: reverse_kl, ce_weight: 0.5", "own": True}
    run = start_stage(**settings, options=["engine.kind=zero3"]).wait(0)
    plain = start_stage(**settings, ranks=1, folder="plain", options=["model.kernels=off"]).wait(0)
    assert_same(figures(run), figures(plain), rel=2e-5, abs=2e-5)
    first, *_, before, after = figures(run)
    assert first[2] == before[1] == 0, "it starts as its teacher"
    assert after[1] > 0 and after[2] < before[2]


def test_stored_likeliest_tokens(start_stage, alone) -> None:
    """All tokens are the teacher itself; the values are computed once, and nothing else changes."""
    everything = {"distill": f"{SETTINGS}, top_k: 512"}
    run = start_stage(**everything, options=["engine.kind=fsdp2"]).wait(0)
    assert_same(figures(run), alone or figures(start_stage(ranks=1, folder="a").wait(0)))
    assert "computing values" in run.output
    few = {"distill": f"{SETTINGS}, top_k: 8"}
    run = start_stage(**few, folder="few", options=["stages.task.train.micro_batch_size=2"]).wait(0)
    again = start_stage(**few, folder="again", ranks=1).wait(0)
    assert "computing values" in run.output and "computing values" not in again.output
    assert_same(figures(again), figures(run))
    assert figures(run)[-1][1] < 0.8 * figures(run)[-2][1]


def test_a_model_that_trains_whole_has_its_start_as_a_teacher(start_stage) -> None:
    settings = {
        "distill": "top_k: 16, ce_weight: 0.5",
        "own": True,
        "options": ["engine.kind=zero3"],
    }
    method = "method={kind: full}"
    run = start_stage(method, "train.learning_rate=0.001", **settings).wait(0)
    *_, before, after = figures(run)
    assert "computing values" in run.output and after[2] < before[2]


def test_killed_it_ends_at_the_same_weights(start_stage, weights) -> None:
    settings = {"distill": f"{SETTINGS}, loss: jsd, beta: 0.3", "dropout": 0.1, "ranks": 1}
    undisturbed = start_stage(folder="undisturbed", **settings).wait(0)
    run = start_stage("train.checkpoint_every_steps=1", **settings)
    run.until(lambda: run.is_at("task", 3))
    run.kill().wait(-signal.SIGKILL)
    run = start_stage("train.checkpoint_every_steps=1", **settings).wait(0)
    assert "resuming from step" in run.output
    assert figures(run) == figures(undisturbed)
    assert weights(run.folder) == weights(undisturbed.folder)


def test_another_teacher_is_refused_on_resume(start_stage, teacher, tmp_path) -> None:
    start_stage(ranks=1).wait(0)
    moved = shutil.copytree(teacher, tmp_path / "moved")
    run = start_stage(ranks=1, options=[f"stages.task.distill.teacher={moved}"]).wait(0)
    assert "already complete" in run.output
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(
        json.dumps(config | {"rope_theta": 500.0, "rms_norm_eps": 1e-3})
    )
    run = start_stage(ranks=1, options=[f"stages.task.distill.teacher={moved}"]).wait(2)
    assert "distill.teacher" in run.output
