"""Options of `train` give the same losses under every engine, rank count and micro-batch.

To write the golden file again after a change that is meant to change the losses:
`DTRAIN_WRITE_GOLDEN=1 pytest tests/distributed/test_train_options.py -k ddp`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "train-options.txt"
STAGE = """{
  name: domain, kind: cpt, method: {kind: lora, r: 8, dropout: 0.1},
  data: {
    sequence_length: 64, sources: [{path: "dtrain:tiny-text/domain.jsonl", format: text}],
    replay: {
      path: "dtrain:tiny-text/domain-heldout.jsonl", format: text, ratio: 0.25, loss_weight: 0.2,
    },
  },
  train: {
    global_batch_size: 4, micro_batch_size: MICRO, steps: 6, learning_rate: 1.0e-2,
    lr_scheduler: warmup_stable_decay, decay_ratio: 0.5, decay_type: 1-sqrt, min_lr_ratio: 0.1,
    learning_rate_scales: {lora_B: 0.5, layers.1: 2.0},
    neftune_noise_alpha: 5.0, label_smoothing: 0.1,
  },
}"""


LOSS_WEIGHTS = 1.0, 0.2


def train(start_ranks: Any, engine: str, ranks: int, micro: int) -> list[dict[str, Any]]:
    """Metrics of every step."""
    stages = f"stages=[{STAGE}]".replace("MICRO", str(micro))
    settings = [stages, f"engine.kind={engine}", "evaluation.sets={}", "output.merge=false"]
    run = start_ranks(*settings, ranks=ranks).wait(0)
    records: list[dict[str, Any]] = run.records("domain")
    return records


@pytest.mark.parametrize(
    ("engine", "ranks", "micro"), [("ddp", 1, 2), ("fsdp2", 2, 2), ("zero2", 2, 1), ("zero3", 2, 1)]
)
def test_engine_ranks_and_micro_batch_change_no_loss_or_gradient_norm(
    start_ranks: Any, engine: str, ranks: int, micro: int
) -> None:
    steps = train(start_ranks, engine, ranks, micro)
    if "DTRAIN_WRITE_GOLDEN" in os.environ:
        lines = [f"{step['loss']:.6f} {step['grad_norm']:.6f}" for step in steps]
        GOLDEN.write_text("\n".join(lines) + "\n")
    golden = [[float(x) for x in line.split()] for line in GOLDEN.read_text().splitlines()]
    assert [s["loss"] for s in steps] == pytest.approx([x for x, _ in golden], abs=2e-5)
    assert [s["grad_norm"] for s in steps] == pytest.approx([x for _, x in golden], rel=2e-3)
    for step in steps:
        sources = zip(LOSS_WEIGHTS, step["sources"].values(), strict=True)
        weighed = [(weight * s["supervised_tokens"], s["loss"]) for weight, s in sources]
        mean = sum(w * loss for w, loss in weighed) / sum(w for w, _ in weighed)
        assert step["loss"] == pytest.approx(mean, rel=1e-6)
