"""Which kernels each causal language model of the installed transformers gets.

They are committed in kernels.txt, which may only grow. To write what was gained:
`DTRAIN_WRITE_GOLDEN=1 pytest tests/architectures/test_kernels.py`.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dtrain.models.kernels.patch import KINDS, patch_modules

LATER_LAYER = re.compile(r"\.([1-9]|\d\d+)\.")  # what one layer gets, the others get
TABLE = Path(__file__).with_name("kernels.txt")
HEAD = "Kernels that each model type gets at least; written by test_kernels.py."
# What a type's default config lacks to build a model.
NEEDED: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 2, "num_experts_per_tok": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "reformer": {"is_decoder": True},
}


def config_of(kind: str) -> PretrainedConfig:
    """The default config of a type, of two layers where it takes a number of them."""
    more = NEEDED.get(kind, {})
    try:
        return CONFIG_MAPPING[kind](num_hidden_layers=2, **more)
    except Exception:  # each config checks its own
        return CONFIG_MAPPING[kind](**more)


def built(kind: str) -> Any:
    """A model without memory, frozen, adapted where PEFT can; None if its defaults build none."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(kind)).requires_grad_(False)
    except Exception:  # of the config, of a library that is missing, of the model
        return None
    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not LATER_LAYER.search(name)
    ]
    try:
        return get_peft_model(model, LoraConfig(target_modules=targets))
    except ValueError:  # PEFT refuses some recurrent ones, and those without linear layers
        return model


@cache
def replaced_kernels() -> dict[str, list[str]]:
    """Kinds of kernels by model type, of the types that can be built."""
    models = ((kind, built(kind)) for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    each = ((kind, patch_modules(model)) for kind, model in models if model is not None)
    return {kind: [name for name in KINDS if name in counts] for kind, counts in each}


def committed() -> dict[str, list[str]]:
    lines = TABLE.read_text().splitlines()[2:] if TABLE.exists() else []
    rows = (line.split(": ") for line in lines)
    return {kind: [] if names == "none" else names.split(", ") for kind, names in rows}


def test_no_model_type_loses_a_kernel() -> None:
    if "DTRAIN_WRITE_GOLDEN" in os.environ:
        rows = committed() | replaced_kernels()
        lines = (f"{kind}: {', '.join(rows[kind]) or 'none'}" for kind in sorted(rows))
        TABLE.write_text("\n".join([HEAD, "", *lines]) + "\n")
    now = replaced_kernels()
    lost = {
        kind: sorted(missing)
        for kind, names in committed().items()
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and (missing := set(names) - set(now.get(kind, ())))
    }
    assert not lost


def test_table_has_every_buildable_model_type() -> None:
    assert replaced_kernels().keys() <= committed().keys(), "write the table again"


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "smollm3", "internlm3", "cwm"])
def test_copies_of_llama_get_every_kernel(kind: str) -> None:
    assert replaced_kernels()[kind] == list(KINDS)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "phi3", "olmo2", "granite", "cohere"])
def test_other_models_get_the_chunked_loss(kind: str) -> None:
    assert "chunked loss" in replaced_kernels()[kind]
