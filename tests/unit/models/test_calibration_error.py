"""The expected calibration error against its definition, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.schema import Model
from dtrain.models.calibration_error import BINS, calibration_gaps, expected_calibration_error
from dtrain.models.kernels.patch import apply_kernels

TOKENS = 60


@pytest.mark.parametrize("kernels", ["auto", "off"])
def test_equals_the_definition(kernels: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens = torch.randint(0, 7, (1, TOKENS))
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1]
    targets = tokens[0, 1:]
    apply_kernels(model, Model(base="x", kernels=kernels))  # type: ignore[arg-type]
    batch = SimpleNamespace(
        input_ids=tokens,
        position_ids=None,
        target_positions=torch.arange(TOKENS - 1),
        targets=targets,
        document_lengths=[TOKENS],
    )
    losses, gaps = calibration_gaps(model, batch)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)

    probabilities = logits.softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets.numpy()
    error = 0.0
    for number in range(BINS):
        inside = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if inside.any():
            distance = abs(right[inside].mean() - confidence[inside].mean())
            error += inside.mean() * float(np.float64(distance))
    assert error > 0.1
    found = expected_calibration_error(gaps.tolist(), TOKENS - 1)
    assert found == pytest.approx(error, abs=1e-4)
