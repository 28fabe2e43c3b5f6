"""The plan's table of kernels is what is really put into each architecture."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.models.kernels.head import CHUNK_BYTES
from dtrain.models.kernels.install import use_kernels
from dtrain.planning import kernels
from dtrain.planning.shapes import ARCHITECTURES

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "vocab_size": 99,
    "pad_token_id": 0,
}
MATTER = {kernels.LAYERS, kernels.NORMS, kernels.MLPS, kernels.LOSS}  # to memory


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_table_names_what_is_put_in(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    model.requires_grad_(False)
    found = use_kernels(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    assert set(found) & MATTER == kernels.KERNELS[kind]


def test_a_chunk_is_as_large_as_the_plan_says() -> None:
    assert CHUNK_BYTES == kernels.CHUNK_BYTES
