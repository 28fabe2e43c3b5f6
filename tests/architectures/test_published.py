"""The plan's counts for published mixtures of experts and hybrids are those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.simulation.model_shape import describe_model
from tests.architectures.published import PUBLISHED

USED = ("num_experts_per_tok", "top_k_experts")


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_of_published_models(name: str) -> None:
    config = AutoConfig.for_model(**PUBLISHED[name])
    shape, text = describe_model(config), config.get_text_config()
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(text).named_parameters())
    total = sum(p.numel() for p in parameters.values())
    used = next((k for key in USED if (k := getattr(text, key, None))), 0)
    idle = [p[used:] for n, p in parameters.items() if ".experts." in n]
    assert shape.parameters == total
    assert shape.active_parameters == total - sum(p.numel() for p in idle)
