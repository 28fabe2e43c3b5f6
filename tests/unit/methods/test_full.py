"""Full fine-tuning of some layers: which parameters train, and in which dtype."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.methods import Full
from dtrain.core.errors import UserError
from dtrain.methods.base import build_method

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **SIZES)).to(torch.bfloat16)


def test_the_last_layers_train_in_float32_and_the_rest_keeps_its_dtype() -> None:
    method = build_method(Full(kind="full", trainable_layers=2))
    assert method.base_dtype(torch.bfloat16) == torch.bfloat16
    attached = method.attach(model(), seed=0)
    for name, parameter in attached.named_parameters():
        trains = name.startswith(("model.layers.1.", "model.layers.2."))
        dtype = torch.float32 if trains else torch.bfloat16
        assert (parameter.requires_grad, parameter.dtype) == (trains, dtype), name
    tokens = torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        attached(input_ids=tokens, labels=tokens).loss.backward()
    changed = {name for name, p in attached.named_parameters() if p.grad is not None}
    assert changed == method.changed_tensors(attached)


FROZEN = ["embed_tokens", r"layers\.0", "mlp.up_proj", "norm"]


def test_frozen_modules_keep_their_dtype_and_the_rest_trains() -> None:
    method = build_method(Full(kind="full", frozen_modules=FROZEN))
    attached = method.attach(model(), seed=0)
    for name, parameter in attached.named_parameters():
        trains = not any(x in name for x in ("embed_tokens", "layers.0.", "up_proj", "model.norm"))
        dtype = torch.float32 if trains else torch.bfloat16
        assert (parameter.requires_grad, parameter.dtype) == (trains, dtype), name


def test_a_pattern_that_freezes_nothing_is_refused_with_near_names() -> None:
    for patterns, message in ((["embed_token"], "embed_tokens"), ([".*"], "every parameter")):
        with pytest.raises(UserError) as refused:
            build_method(Full(kind="full", frozen_modules=patterns)).attach(model(), seed=0)
        assert str(refused.value.where) == "method.frozen_modules"
        assert message in str(refused.value)


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match="has 3 decoder layers, not 4") as refused:
        build_method(Full(kind="full", trainable_layers=4)).attach(model(), seed=0)
    assert refused.value.where == "method.trainable_layers"
