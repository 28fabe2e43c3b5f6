"""A model, whose packed documents would mix, trains one document at a time on any ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"hidden_size": 64, "n_head": 4, "n_layer": 2}
TEXTS = [" ".join(["a"] * number) for number in range(1, 10)]
WAYS = [("ddp", 2, 2), ("fsdp2", 2, 1), ("zero3", 2, 2)]


@pytest.fixture(scope="module")
def bloom(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BLOOM, whose positions count through a packed sequence, with tiny's tokenizer."""
    tiny, folder = cache / "samples" / "tiny-llama", tmp_path_factory.mktemp("bloom")
    vocabulary = json.loads((tiny / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=vocabulary, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in (*tiny.glob("tokenizer*"), *tiny.glob("*.jinja")):
        shutil.copy(path, folder)
    return folder


def test_losses_do_not_depend_on_the_number_of_ranks(start_ranks, bloom, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    overrides = [
        f"model.base={bloom}",
        "stages.domain.method={kind: lora, r: 8, alpha: 16, dropout: 0.1}",
        f"stages.domain.data.sources=[{{path: {texts}, format: text}}]",
        # 9 rows: the last of three steps has one, so that a rank has none
        *("stages.domain.train.steps=null", "stages.domain.train.epochs=1"),
        "stages.task.train.steps=2",
        *(f"stages.{stage}.data.packing=false" for stage in ("domain", "task")),
        *(f"evaluation.sets.{name}.packing=false" for name in ("domain", "task")),
        *(f"stages.{s}.train.checkpoint_every_steps=null" for s in ("domain", "task")),
    ]

    def run(engine: str, ranks: int, micro: int):
        batch = [f"stages.{s}.train.micro_batch_size={micro}" for s in ("domain", "task")]
        return start_ranks(
            f"engine.kind={engine}", *overrides, *batch, ranks=ranks, folder=f"{engine}-{ranks}"
        ).wait(0)

    alone = run("ddp", 1, 1)
    expected, held_out = step_losses(alone), alone.json("evaluation.json")["losses"]
    assert [name for name, *_ in expected] == ["domain"] * 3 + ["task"] * 2
    for engine, ranks, micro in WAYS:
        result = run(engine, ranks, micro)
        for line, first in zip(step_losses(result), expected, strict=True):
            assert line[:2] == first[:2]
            assert line[2:] == pytest.approx(first[2:], abs=2e-5), (engine, ranks, micro)
        for name, losses in result.json("evaluation.json")["losses"].items():
            assert losses == pytest.approx(held_out[name], abs=2e-5), (engine, ranks, micro)
        is_reported = (
            "micro-batches of one sequence, as its predictions depend on other documents"
            in result.output
        )
        assert is_reported == (micro > 1)


def step_losses(run) -> list[tuple[str, int, float]]:
    """Stage, step and loss of every step."""
    return [
        (stage, record["step"], record["loss"])
        for stage in ("domain", "task")
        for record in run.records(stage)
        if "loss" in record
    ]
