"""Experts of images, which no text reaches: nothing trains, rounds or counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMultimodalLM, PretrainedConfig

from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.nf4 import Nf4Base
from dtrain.models.expert_layers import expert_parameters
from dtrain.simulation.model_shape import describe_model

EXPERTS, ACTIVE = 4, 2
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 99,
    "moe_intermediate_size": [16, 16], "moe_num_experts": EXPERTS, "moe_k": ACTIVE,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [22, 22, 20],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> PretrainedConfig:
    """Of a model whose layers have experts of texts and others of images."""
    images = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    made: Any = AutoConfig.for_model("ernie4_5_vl_moe", text_config=TEXT, vision_config=images)
    return made


def test_the_plan_counts_no_experts_that_a_text_does_not_reach(config: PretrainedConfig) -> None:
    shape = describe_model(config)
    experts = {x.name.split(".")[1]: (x.active, x.adaptable) for x in shape.experts}
    assert experts == {"text_moe": (ACTIVE, True), "vision_moe": (0, False)}
    idle = sum(
        (x.experts - ACTIVE if "text" in x.name else x.experts) * x.inputs * x.outputs
        for x in shape.experts
    )
    assert shape.active_parameters == shape.parameters - idle


def test_a_merge_does_not_round_experts_that_a_text_does_not_reach(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    model: Any = AutoModelForMultimodalLM.from_config(config)
    assert {name.split(".")[5] for name in expert_parameters(model)} == {"text_moe", "vision_moe"}
    model.save_pretrained(tmp_path)
    rounded = {n for n in Nf4Base(BaseTensors(tmp_path), torch.float32).names if ".experts." in n}
    stored = {n for n in load_file(tmp_path / "model.safetensors") if ".mlp.experts." in n}
    of_texts = {n for n in stored if int(n.split(".experts.")[1].split(".")[0]) < EXPERTS}
    assert rounded == of_texts < stored
