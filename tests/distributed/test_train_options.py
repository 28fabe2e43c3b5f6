"""Options of `train` give the same losses under every engine, rank count and micro-batch.

To write the golden file again after a change that is meant to change the losses:
`DTRAIN_WRITE_GOLDEN=1 pytest tests/distributed/test_train_options.py -k writes`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "train-options.txt"
STAGE = """{
  name: domain, kind: cpt, method: {kind: lora, r: 8, dropout: 0.1},
  data: {sequence_length: 64, sources: [{path: "dtrain:tiny-text/domain.jsonl", format: text}]},
  train: {
    global_batch_size: 4, micro_batch_size: MICRO, steps: 6, learning_rate: 1.0e-2,
    lr_scheduler: warmup_stable_decay, decay_ratio: 0.5, decay_type: 1-sqrt, min_lr_ratio: 0.1,
    neftune_noise_alpha: 5.0,
  },
}"""


def train(start_ranks: Any, engine: str, ranks: int, micro: int) -> list[list[float]]:
    """Loss and gradient norm of every step."""
    stages = f"stages=[{STAGE}]".replace("MICRO", str(micro))
    settings = [stages, f"engine.kind={engine}", "evaluation.sets={}", "output.merge=false"]
    run = start_ranks(*settings, ranks=ranks).wait(0)
    return [[record["loss"], record["grad_norm"]] for record in run.records("domain")]


@pytest.mark.skipif("DTRAIN_WRITE_GOLDEN" not in os.environ, reason="writes the golden file")
def test_writes_golden(start_ranks: Any) -> None:
    lines = [f"{loss:.6f} {norm:.6f}" for loss, norm in train(start_ranks, "ddp", 1, 1)]
    GOLDEN.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("engine", "ranks", "micro"), [("ddp", 1, 2), ("fsdp2", 2, 2), ("zero2", 2, 1), ("zero3", 2, 1)]
)
def test_losses(start_ranks: Any, engine: str, ranks: int, micro: int) -> None:
    golden = [[float(x) for x in line.split()] for line in GOLDEN.read_text().splitlines()]
    losses = train(start_ranks, engine, ranks, micro)
    assert [loss for loss, _ in losses] == pytest.approx([x for x, _ in golden], abs=2e-5)
    assert [norm for _, norm in losses] == pytest.approx([x for _, x in golden], rel=2e-3)
