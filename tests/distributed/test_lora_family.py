"""DoRA with a learning rate of B of its own: a golden file for every engine, as of LoRA.

To write it again: `DTRAIN_WRITE_GOLDEN=1 pytest tests/distributed/test_lora_family.py -k ddp`.
"""

from __future__ import annotations

import pytest

METHOD = [
    f"stages.{stage}.{setting}"
    for stage in ("domain", "task")
    for setting in (
        "method.kind=dora",
        "method.loraplus_lr_ratio=4",
        "train.learning_rate=2.5e-3",
    )
]
MICRO = [f"stages.{stage}.train.micro_batch_size=2" for stage in ("domain", "task")]


@pytest.mark.parametrize(
    ("engine", "ranks", "more"),
    [
        ("ddp", 1, ["model.kernels=off", *MICRO]),
        ("fsdp2", 2, []),
        ("zero2", 2, MICRO),
        ("zero3", 2, ["model.kernels=off"]),
    ],
)
def test_engines_give_the_golden_losses(start_ranks, engine, ranks, more) -> None:
    run = start_ranks(f"engine.kind={engine}", *METHOD, *more, ranks=ranks).wait(0)
    run.assert_golden("dora")
