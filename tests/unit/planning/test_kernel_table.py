"""The plan's table of kernels matches the layers that each architecture really gets."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.models.kernels.patch import patch_modules
from dtrain.planning.activations import chunk_rows
from dtrain.planning.architectures import ARCHITECTURES
from dtrain.planning.kernel_table import ADAPTED_LAYERS, KERNELS, LOSS, MLPS, NORMS

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "vocab_size": 99,
    "pad_token_id": 0,
}
CHANGE_MEMORY = {ADAPTED_LAYERS, NORMS, MLPS, LOSS}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_kernel_table_matches_the_patched_model(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    model.requires_grad_(False)
    used = patch_modules(get_peft_model(model, LoraConfig(target_modules="all-linear")))
    assert set(used) & CHANGE_MEMORY == KERNELS[kind]


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(32_000, 2048), (151_936, 256), (262_144, 256), (400_000, 128)]
)
def test_chunk_rows_suit_matrix_products(vocabulary: int, rows: int) -> None:
    assert chunk_rows(vocabulary) == rows
