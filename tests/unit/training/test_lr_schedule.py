"""The learning rate of every step, against the schedules of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import optimization

from dtrain.config.train import Train
from dtrain.training.lr_schedule import learning_rate

STEPS, WARMUP = 40, 4
PEAK = 2e-3


def train(**settings: Any) -> Train:
    settings = {"learning_rate": PEAK, "warmup_ratio": WARMUP / STEPS} | settings
    return Train(global_batch_size=1, steps=STEPS, **settings)


def rates(steps: int = STEPS, **settings: Any) -> list[float]:
    return [learning_rate(step, steps, train(**settings)) for step in range(steps)]


def reference(function: str, **options: Any) -> list[float]:
    """The rate of each step by a schedule of transformers."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    schedule = getattr(optimization, function)(optimizer, num_warmup_steps=WARMUP, **options)
    return [PEAK * schedule.lr_lambdas[0](step) for step in range(STEPS)]


TOTAL = {"num_training_steps": STEPS}
WSD = {"num_decay_steps": 10, "num_training_steps": STEPS}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("get_cosine_schedule_with_warmup", TOTAL)),
        ({"lr_scheduler": "linear"}, ("get_linear_schedule_with_warmup", TOTAL)),
        ({"lr_scheduler": "constant"}, ("get_constant_schedule_with_warmup", {})),
        (
            {"min_lr_ratio": 0.1},
            ("get_cosine_with_min_lr_schedule_with_warmup", TOTAL | {"min_lr_rate": 0.1}),
        ),
        *(
            (
                {"decay_ratio": 0.25, "decay_type": shape, "min_lr_ratio": least}
                | {"lr_scheduler": "warmup_stable_decay"},
                ("get_wsd_schedule", WSD | {"decay_type": shape, "min_lr_ratio": least}),
            )
            for shape, least in (("linear", 0.0), ("cosine", 0.2), ("1-sqrt", 0.1))
        ),
    ],
    ids=str,
)
def test_schedules_equal_those_of_transformers(
    settings: dict[str, Any], expected: tuple[str, dict[str, Any]]
) -> None:
    """After the warm-up, whose first step transformers wastes on a rate of 0."""
    function, options = expected
    assert rates(**settings)[WARMUP:] == pytest.approx(reference(function, **options)[WARMUP:])
    assert rates(**settings)[:WARMUP] == pytest.approx([PEAK * n / WARMUP for n in (1, 2, 3, 4)])


def test_a_longer_stage_with_wsd_stays_at_the_peak_until_its_own_decay() -> None:
    """The rates before the first stage's decay are unchanged, so a resume follows one curve."""
    wsd = {"lr_scheduler": "warmup_stable_decay", "decay_ratio": 0.25, "warmup_ratio": 0.0}
    short, long = rates(**wsd), rates(2 * STEPS, **wsd)
    assert short[:31] == long[:31] == [PEAK] * 31
    assert short[31] < PEAK
    assert long[:61] == [PEAK] * 61
    assert long[61] < PEAK
