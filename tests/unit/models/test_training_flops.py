"""The 4P and 6P rules, and where the backward pass ends."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from dtrain.config.methods import Full, Lora
from dtrain.methods.base import build_method
from dtrain.models.parameter_counts import parameter_counts
from dtrain.models.training_flops import training_flops_per_token


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("cpu"):
        return LlamaForCausalLM(config).requires_grad_(False)


def test_a_frozen_base_costs_four_and_trained_weights_six() -> None:
    table = 64 * 32  # of the input embedding, which is only looked up
    full = build_method(Full(kind="full")).attach(llama(), seed=0)
    total = parameter_counts(full)[1]
    assert training_flops_per_token(full) == 6 * (total - table)
    tied = build_method(Full(kind="full")).attach(llama(tied=True), seed=0)
    assert training_flops_per_token(tied) == 6 * parameter_counts(tied)[1]
    lora = build_method(Lora(kind="lora", r=4, alpha=8.0)).attach(llama(), seed=0)
    trained, total = parameter_counts(lora)
    assert training_flops_per_token(lora) == 4 * (total - trained - table) + 6 * trained


def test_below_the_lowest_trained_layer_there_is_no_backward_pass() -> None:
    model = build_method(Full(kind="full", trainable_layers=1)).attach(llama(), seed=0)
    trained, total = parameter_counts(model)
    below, above = 3 * trained, total - 4 * trained - 64 * 32
    assert training_flops_per_token(model) == 2 * below + 6 * trained + 4 * above


def test_a_token_is_computed_with_its_share_of_the_experts() -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16,
    )  # fmt: skip

    def attached(settings: Full | Lora) -> nn.Module:
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        return build_method(settings).attach(model, seed=0)

    full = attached(Full(kind="full"))
    idle = 2 * 6 * (3 * 32 * 16)  # in each of two layers six of eight experts
    total = parameter_counts(full)[1] - 64 * 32  # the input embedding is only looked up
    routers = 2 * 8 * 32  # they stay as they are
    assert training_flops_per_token(full) == 6 * (total - idle) - 2 * routers
    lora = attached(Lora(kind="lora", r=4, alpha=8.0))
    trained = parameter_counts(lora)[0]
    idle_adapters = 2 * 6 * 4 * ((32 + 32) + (16 + 32))
    expected = 4 * (total - idle) + 6 * (trained - idle_adapters)
    assert training_flops_per_token(lora) == expected
