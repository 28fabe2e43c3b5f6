"""A base that comes block by block: tied matrices, packed layers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config.load import load_recipe
from dtrain.models.stream import stream_base

SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 32,
}


def test_a_tied_base_is_streamed(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = load_recipe("tiny").model
    cpu = torch.device("cpu")
    streamed = stream_base(tmp_path, settings, quantised=False, dtype=torch.float32, device=cpu)
    assert streamed is not None, "every rank would load the whole base"
    streamed.fill(streamed.model)
    assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    assert not streamed.model.lm_head.weight.is_meta


def test_a_streamed_layer_is_unpacked_to_what_it_computes_in(tmp_path: Path) -> None:
    """To float32 it would need three times the room, for the largest matrix of a large model."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(
        tmp_path
    )
    settings, cpu = load_recipe("tiny").model, torch.device("cpu")
    streamed = stream_base(tmp_path, settings, quantised=True, dtype=torch.bfloat16, device=cpu)
    streamed.fill(streamed.model)
    weight = streamed.model.model.layers[0].mlp.down_proj.weight
    assert weight.quant_state.dtype == torch.bfloat16
