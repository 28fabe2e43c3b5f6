"""Trainable parameters, their initialization, and loading by PEFT."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.core.errors import Exit, UserError
from dtrain.methods.base import build_method
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.parameter_counts import parameter_counts
from dtrain.objectives.base import adapters_disabled
from tests.micro_batches import fill_lora_b

LORA = Lora(kind="lora", r=4, alpha=6.0, dropout=0.1)


def base(dtype: torch.dtype = torch.float32, **settings: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_initial_weights_depend_only_on_the_seed() -> None:
    first = trainable(build_method(LORA).attach(base(), seed=5))
    torch.manual_seed(99)
    model = base()
    torch.rand(1000)
    again = trainable(build_method(LORA).attach(model, seed=5))
    half = trainable(build_method(LORA).attach(base(torch.bfloat16), seed=5))
    different = trainable(build_method(LORA).attach(base(), seed=6))
    assert first.keys() == again.keys() == half.keys()
    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], half[n]) for n in first)
    assert all(t.dtype == torch.float32 for t in half.values())
    assert not any(torch.equal(first[n], different[n]) for n in first if "lora_A" in n)


def test_layers_get_different_initial_weights() -> None:
    model = build_method(LORA).attach(base(), seed=5)
    first = [tensor for name, tensor in trainable(model).items() if "lora_A" in name]
    marks = {tuple(tensor.flatten()[:8].tolist()) for tensor in first}
    assert len(marks) == len(first) == 14


def test_initial_weights_have_pefts_distribution() -> None:
    first = trainable(build_method(Lora(kind="lora", r=64)).attach(base(), seed=5))
    assert all(not t.any() for n, t in first.items() if "lora_B" in n)
    for name, tensor in first.items():
        if "lora_A" in name:
            bound = 1 / math.sqrt(tensor.shape[1])
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_no_gradient_below_the_first_adapter() -> None:
    model = base()
    model.activation_checkpointing_enable({"use_reentrant": False})
    adapted = build_method(Lora(kind="lora", dropout=0.0)).attach(model, seed=0)
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.requires_grad)
    )
    ids = torch.arange(8)[None]
    adapted(input_ids=ids, use_cache=False).logits.sum().backward()
    assert seen == [False]
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("target_modules", [["q_proj", "nonsense"], ["nonsense"], ["self_attn"]])
def test_unknown_target_lists_the_linear_layers(target_modules: list[str]) -> None:
    with pytest.raises(UserError, match="no linear layer is named") as caught:
        build_method(Lora(kind="lora", target_modules=target_modules)).attach(base(), seed=0)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught)


def test_tied_output_layer_is_refused_as_target() -> None:
    method = Lora(kind="lora", target_modules=["lm_head"])
    with pytest.raises(UserError, match="tied"):
        build_method(method).attach(base(tie_word_embeddings=True), seed=0)
    untied = trainable(build_method(method).attach(base(tie_word_embeddings=False), seed=0))
    assert len(untied) == 2


PATTERNS = Lora(
    kind="lora", r=4, alpha=6.0, dropout=0.0,
    rank_pattern={r"layers\.1\..*q_proj": 3, "q_proj|up_proj": 5},
    alpha_pattern={"^model.layers.0.self_attn.v_proj": 40.0},
)  # fmt: skip


def test_patterns_give_pefts_ranks_and_scales(tmp_path: Path) -> None:
    model = build_method(PATTERNS).attach(base(), seed=5)
    fill_lora_b(model, std=0.1)
    build_method(PATTERNS).save(tmp_path / "adapter", model, trainable(model))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == PATTERNS.rank_pattern
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    layers = {n: m for n, m in loaded.named_modules() if isinstance(m, LoraLayer)}
    ours = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == len(ours) == 14
    assert {n: (m.r, m.scaling) for n, m in layers.items()} == {
        n: (m.r, m.scaling) for n, m in ours.items()
    }
    assert sorted({m.r["default"] for m in ours.values()}) == [3, 4, 5]
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_shared_input_kernel_takes_layers_of_different_ranks() -> None:
    losses = []
    for kernels in ("off", "auto"):
        model = build_method(PATTERNS).attach(base(), seed=5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
        apply_kernels(model, schema.Model(base="x", kernels=kernels))
        loss = model(input_ids=torch.arange(20)[None], use_cache=False).logits.logsumexp(-1).mean()
        loss.backward()
        gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        losses.append(torch.stack([loss.detach(), *gradients]))
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"q_prj": 3}, "did you mean q_proj"),
        ({"lm_head": 3}, "choose from: down_proj, gate_proj"),
        ({".*": 3, "q_proj": 8}, "earlier patterns match all"),
    ],
)
def test_pattern_without_effect_is_refused(patterns: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=r"method.rank_pattern") as caught:
        build_method(Lora(kind="lora", rank_pattern=patterns)).attach(base(), seed=0)
    assert message in str(caught.value)


def test_full_trains_all_parameters_in_float32() -> None:
    model = build_method(Full(kind="full")).attach(base(torch.bfloat16), seed=0)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert model.training
    total = sum(p.numel() for p in model.parameters())
    assert parameter_counts(model) == (total, total)


def trained(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """An adapter that changes the logits, saved."""
    model = build_method(LORA).attach(base(), seed=5)
    fill_lora_b(model, std=0.1)
    tensors = trainable(model)
    build_method(LORA).save(folder, model, tensors, base="some/base")
    return model.eval(), tensors


def test_peft_loads_the_same_model(tmp_path: Path) -> None:
    model, tensors = trained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    ids = torch.arange(20)[None]
    logits = loaded(ids).logits
    assert torch.equal(logits, model(ids).logits)
    assert not torch.allclose(logits, base().eval()(ids).logits, atol=1e-3)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(stored) == len(tensors) == 28
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in stored


def test_adapter_config_is_complete_and_deterministic(tmp_path: Path) -> None:
    trained(tmp_path / "one")
    trained(tmp_path / "two")
    text = (tmp_path / "one" / "adapter_config.json").read_text()
    assert text == (tmp_path / "two" / "adapter_config.json").read_text()
    config = json.loads(text)
    expected = {
        "r": 4,
        "lora_alpha": 6.0,
        "base_model_name_or_path": "some/base",
        "peft_type": "LORA",
    }
    assert expected.items() <= config.items()
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])


def test_saving_again_replaces_the_folder(tmp_path: Path) -> None:
    model, tensors = trained(tmp_path / "adapter")
    doubled = {name: 2 * tensor for name, tensor in tensors.items()}
    build_method(LORA).save(tmp_path / "adapter", model, doubled)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(iter(doubled))
    assert torch.equal(stored[name.replace(".default.", ".")], doubled[name])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_non_finite_adapter_is_not_saved(tmp_path: Path) -> None:
    model, tensors = trained(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    name = sorted(tensors)[3]
    tensors[name][0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite") as caught:
        build_method(LORA).save(tmp_path / "adapter", model, tensors)
    assert name in str(caught) and caught.value.status == Exit.NON_FINITE
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_incomplete_adapter_is_not_saved(change: str, tmp_path: Path) -> None:
    model, tensors = trained(tmp_path / "adapter")
    if change == "missing":
        tensors.pop(sorted(tensors)[0])
    else:
        tensors["other"] = torch.zeros(1)
    with pytest.raises(AssertionError, match="disagree on 1 names"):
        build_method(LORA).save(tmp_path / "new", model, tensors)
    assert not (tmp_path / "new").exists()


WHOLE = Lora(
    kind="lora", r=4, dropout=0.0, modules_to_save=["embed_tokens", "lm_head", "model.norm"]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_train_whole_start_as_the_base_and_load_in_peft(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    ids = torch.arange(20)[None]
    before = base(dtype, tie_word_embeddings=tied).eval()(ids).logits
    model = build_method(WHOLE).attach(base(dtype, tie_word_embeddings=tied), seed=5)
    whole = {n: p for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert len(whole) == (2 if tied else 3)
    assert all(p.dtype == torch.float32 for p in whole.values())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(model(ids, use_cache=False).logits, before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    with adapters_disabled(model), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(model(ids, use_cache=False).logits, before)
    build_method(WHOLE).save(tmp_path / "adapter", model, trainable(model))
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ends = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    assert {f"base_model.model.{end}" for end in ends} <= stored.keys()
    loaded = PeftModel.from_pretrained(base(tie_word_embeddings=tied), tmp_path / "adapter").eval()
    if dtype == torch.float32:
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["embed_token"]}, "did you mean embed_tokens"),
        ({"modules_to_save": ["self_attn"]}, "is no single layer with weights"),
        ({"modules_to_save": ["embed_tokens"]}, "add lm_head, so that it trains as one"),
        (
            {"modules_to_save": ["q_proj"], "target_modules": ["q_proj", "v_proj"]},
            "cannot have an adapter and train whole",
        ),
    ],
)
def test_modules_that_cannot_train_whole_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match="modules_to_save") as caught:
        build_method(Lora(kind="lora", **settings)).attach(base(tie_word_embeddings=True), seed=0)
    assert message in str(caught.value)


def test_layer_that_trains_whole_gets_no_adapter() -> None:
    settings = Lora(kind="lora", modules_to_save=["down_proj"])
    names = trainable(build_method(settings).attach(base(), seed=0))
    assert sum("down_proj" in name for name in names) == 2
    assert not any("down_proj.lora" in name for name in names)
