"""Each kind of trouble in a curve is found, with its figures; a healthy curve has no alert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dtrain.monitoring.alerts import find_alerts

STEPS = 200


def healthy(noise: float = 0.05, **changes: Callable[[int], Any]) -> list[dict[str, Any]]:
    """A stage with a normal loss, and other values where `changes` has a function of the step."""
    random = np.random.default_rng(1)
    records = []
    for step in range(1, STEPS + 1):
        loss = 1.8 + 1.2 * np.exp(-step / 30) + noise * random.standard_normal()
        record = {
            "step": step,
            "loss": float(loss),
            "tokens": 4096,
            "grad_norm": float(0.5 + 0.1 * random.random()),
            "tokens_per_second": float(1000 + 50 * random.standard_normal()),
            "seconds": {"data": 0.01, "compute": 3.0, "update": 0.1, "other": 0.01},
        }
        record |= {key: change(step) for key, change in changes.items()}
        records.append({key: value for key, value in record.items() if value is not None})
    return records


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3])
def test_a_healthy_curve_has_none(noise) -> None:
    held_out = healthy(noise, held_out=lambda step: {"a": 2.0} if step % 50 == 0 else None)
    assert find_alerts(healthy(noise)) == find_alerts(held_out) == []
    assert find_alerts(healthy(noise)[:25]) == find_alerts([]) == []


@pytest.mark.parametrize(
    ("kind", "key", "change", "evidence"),
    [
        ("loss spike", "loss", lambda s: 6.0 if s == 120 else 2.0 - s / 1000, "the loss was 6.000"),
        ("divergence", "loss", lambda s: abs(s - 60) / 30 + 2.0, "was 3.650 at the start"),
        ("plateau", "loss", lambda s: 2.5 + (s % 3) / 100, "after 200 steps"),
        ("loss at zero", "loss", lambda s: 3.0 / s if s < 50 else 1e-5, "below 0.001 at 151"),
        ("growing gradient norm", "grad_norm", lambda s: 0.5 if s < 170 else 5.0, "0.5 to 5"),
        (
            "uneven experts",
            "experts",
            lambda s: {
                "layers.0": {"max_load": 1.1},
                "layers.1": {"max_load": 1.2 if s < 170 else 6.0},
            },
            "got 1.2 times an even share of its tokens, and gets 6.0",
        ),
        ("slower steps", "tokens_per_second", lambda s: 1000 if s < 150 else 400, "400 tokens/s"),
        ("data starved", "seconds", lambda s: {"data": 1.0, "compute": 1.0}, "50 % of a step"),
        ("non-finite steps", "skipped", lambda s: "nan" if s > 197 else None, "3 of 200 updates"),
    ],
)
def test_trouble_is_found_with_its_figures(kind, key, change, evidence) -> None:
    alerts = {alert.kind: alert for alert in find_alerts(healthy(**{key: change}))}
    assert kind in alerts, alerts
    assert evidence in alerts[kind].evidence
    assert alerts[kind].advice


def test_held_out_loss_that_rises_while_the_training_loss_falls() -> None:
    def held_out(step: int) -> dict[str, float] | None:
        return {"task": 2.0 + abs(step - 80) / 400} if step % 40 == 0 else None

    (alert,) = find_alerts(healthy(loss=lambda step: 3 - step / 100, held_out=held_out))
    assert alert.kind == "overfitting" and "fewer epochs" in alert.advice
    assert "of task rose from 2.000 (step 80) to 2.300" in alert.evidence
    underfit = find_alerts(healthy(loss=lambda step: 3 + step / 1000, held_out=held_out))
    assert "overfitting" not in {alert.kind for alert in underfit}


def test_memory_nearly_full() -> None:
    records = healthy(
        memory_capacity_bytes=lambda step: 80e9,
        memory_reserved_bytes=lambda step: 78e9 if step == 9 else 60e9,
    )
    (alert,) = find_alerts(records)
    assert alert.kind == "GPU memory nearly full" and "98 %" in alert.evidence and alert.step == 9


def test_a_stranger_s_values_break_nothing() -> None:
    odd = [None, "x", float("nan"), float("inf"), {}, [1], {"a": "b"}, {"a": None}, True, -1.0]
    keys = ["loss", "held_out", "seconds", "grad_norm", "skipped", "tokens", "tokens_per_second"]
    keys += ["experts"]
    records = healthy()
    for number, record in enumerate(records):
        record[keys[number % len(keys)]] = odd[number % len(odd)]
    for alert in find_alerts(records):
        assert str(alert)
