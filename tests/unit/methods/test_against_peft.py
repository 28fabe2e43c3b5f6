"""PEFT as oracle: the same losses of a few steps, the same logits of what is saved and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dtrain.config.methods import parse_method
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.methods.base import build_method
from dtrain.models.dropout import set_dropout_key
from dtrain.objectives.base import adapters_disabled

STEPS = 5
IDS = torch.arange(24).view(1, 24) % 61
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
METHODS: dict[str, tuple[dict[str, Any], PeftConfig]] = {
    "ia3": ({}, IA3Config(task_type="CAUSAL_LM", **IA3)),
    "vera": (
        {"r": 32, "projection_seed": 3, "dropout": 0.0},
        VeraConfig(task_type="CAUSAL_LM", r=32, projection_prng_key=3, target_modules=ALL),
    ),
}


WHOLE = {"modules_to_save": ["lm_head", "norm"]}  # with the adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def load(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)


def losses(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    values = []
    for step in range(STEPS):
        set_dropout_key(model, 0, step, [0], [IDS.shape[1]])
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def trained(kind: str, base: Path, **more: Any) -> tuple[Any, nn.Module, list[float]]:
    method = build_method(parse_method({"kind": kind, **METHODS[kind][0], **more}))
    model = method.attach(load(base), seed=0)
    return method, model, losses(model)


def save(method: Any, model: nn.Module, folder: Path) -> Path:
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    method.save(folder, model, tensors)
    return folder


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", METHODS)
def test_losses_are_those_of_peft(kind: str, base: Path) -> None:
    ours = trained(kind, base)[2]
    torch.manual_seed(1)  # PEFT draws nothing that counts
    theirs = losses(get_peft_model(load(base), METHODS[kind][1]))
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert ours[-1] < ours[0] - 0.02, "nothing was learned: the comparison would prove nothing"


@pytest.mark.parametrize("kind", METHODS)
def test_starts_as_the_base_and_returns_to_it(kind: str, base: Path) -> None:
    method = build_method(parse_method({"kind": kind, **METHODS[kind][0]}))
    model, expected = method.attach(load(base), seed=0), logits(load(base))
    assert torch.equal(logits(model), expected)
    model.train()
    losses(model)
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with adapters_disabled(model):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("more", [{}, WHOLE], ids=["alone", "whole"])
@pytest.mark.parametrize("kind", METHODS)
def test_peft_loads_and_merges_the_same_model(
    kind: str, more: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    method, model, _ = trained(kind, base, **more)
    folder = save(method, model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(base), folder)
    expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    job = MergeJob(base, tmp_path / "merged", source="a base")
    job.merge_adapters([adapter_input(MergeableAdapter.open(folder, job.tensors))])
    merged = load(tmp_path / "merged")
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    theirs = loaded.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in merged.state_dict().items())
    base_state = load(base).state_dict()
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, base_state[n])}
    assert changed == method.changed_tensors(model)
