"""Model facts from a meta model: layers used by text, experts, layers that NF4 can pack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, LlamaConfig

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.methods.base import build_method
from dtrain.models import quantize
from dtrain.models.load import load_base
from dtrain.models.meta_model import (
    build_meta_model,
    linear_layers,
    unused_linear_layers,
    unused_parameters,
)
from dtrain.models.quantize import nf4_layers
from dtrain.models.sharded_loading import stream_base
from dtrain.models.weight_reads import WeightReadRecorder, layers_read_outside_forward

CPU, META = torch.device("cpu"), torch.device("meta")
LORA = Lora(kind="lora", r=2, dropout=0.0)
GEMMA4_MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
              "moe_intermediate_size": 32}  # fmt: skip


def loss(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(4, 24)[None], use_cache=False).logits.float().square().mean()


def adapted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "mistral3", "bart", "llama"])
def test_unused_parameters_are_those_without_gradient(
    tmp_path: Path, save_small: Callable, kind: str
) -> None:
    """Compared with a real backward pass; for a text-only model it is nothing."""
    model = save_small(kind, tmp_path)
    unused = unused_parameters(build_meta_model(model.config))
    loss(model).backward()
    assert unused == {name for name, p in model.named_parameters() if p.grad is None}
    assert bool(unused) == (kind != "llama")


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "k_proj"]])
@pytest.mark.parametrize("kind", ["gemma3", "gemma3n_text", "gemma4", "bart"])
def test_every_adapter_gets_a_gradient(
    tmp_path: Path, save_small: Callable, kind: str, target_modules: str | list[str]
) -> None:
    """One that never does would end DDP with a traceback.

    No text reaches an image tower; Gemma 3n reads the weight of a layer that it never calls.
    """
    model = save_small(kind, tmp_path).requires_grad_(False)
    settings = LORA.model_copy(update={"target_modules": target_modules})
    adapted = build_method(settings).attach(model, seed=0)
    loss(adapted).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert not [name for name in adapted_names(adapted) if "lm_head" in name]


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("jamba", "mamba.dt_proj"), ("qwen4_exp_text", "self_attn.indexer.index_qk_proj")],
)
def test_in_a_mixture_of_experts_too(
    tmp_path: Path, save_small: Callable, capsys: pytest.CaptureFixture[str], kind: str, layer: str
) -> None:
    """Jamba reads the weight of `dt_proj`; Qwen 4's indexer only chooses."""
    model = save_small(kind, tmp_path).requires_grad_(False)
    adapted = build_method(LORA).attach(model, seed=0)
    loss(adapted).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert adapted_names(adapted)
    assert not [name for name in adapted_names(adapted) if name.endswith(layer)]
    assert "as none would act there: " in (out := capsys.readouterr().out)
    assert f"model.layers.*.{layer}" in out


def test_a_layer_that_multiplies_groups_apart_is_no_linear_map() -> None:
    config = AutoConfig.for_model("deepseek_v4", num_hidden_layers=2)
    unused = unused_linear_layers(build_meta_model(config))
    assert "model.layers.1.self_attn.o_a_proj" in unused
    assert "model.layers.1.self_attn.o_b_proj" not in unused


def test_a_linear_layer_may_return_more_than_its_product() -> None:
    """Llama 4's router does; no text reaches the model's tower."""
    text = {"num_hidden_layers": 2, "num_local_experts": 2, "vocab_size": 64}
    config = AutoConfig.for_model(
        "llama4", text_config=text, vision_config={"num_hidden_layers": 1}
    )
    unused = unused_linear_layers(build_meta_model(config))
    assert any(name.startswith("vision_model.") for name in unused)
    assert not any(name.startswith("language_model.") for name in unused)


def test_layers_that_peft_cannot_adapt_are_left_out_or_refused(
    tmp_path: Path, save_small: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_small("mamba", tmp_path).requires_grad_(False)
    named = LORA.model_copy(update={"target_modules": ["in_proj", "out_proj"]})
    with pytest.raises(UserError, match="incompatible with Mamba-based models"):
        build_method(named).attach(copy.deepcopy(model), seed=0)
    adapted = build_method(LORA).attach(model, seed=0)
    assert not [name for name in adapted_names(adapted) if "out_proj" in name]
    assert "get no adapter, as PEFT has none for them" in capsys.readouterr().out


def test_full_training_leaves_an_image_tower_frozen(
    tmp_path: Path, save_small: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_method(Full(kind="full")).attach(save_small("gemma3", tmp_path), seed=0)
    loss(model).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in model.named_parameters() if p.grad is None}
    assert any("vision_tower" in name for name in frozen)
    assert "stay frozen, as no text reaches them: model.multi_modal_projector, model.vision" in (
        "".join(capsys.readouterr())
    )


def test_targets_only_in_an_image_tower_are_refused(tmp_path: Path, save_small: Callable) -> None:
    model = save_small("gemma3", tmp_path)
    with pytest.raises(UserError, match="no text reaches"):
        build_method(LORA.model_copy(update={"target_modules": ["out_proj"]})).attach(model, seed=0)


@pytest.mark.parametrize(
    "kind, changes",
    [("falcon", {}), ("gpt2", {}), ("llama", {"hidden_size": 36, "intermediate_size": 37})],
)
@pytest.mark.parametrize("load", [stream_base, load_base])
def test_layers_that_nf4_cannot_pack_are_refused_before_loading(
    tmp_path: Path, save_small: Callable, kind: str, changes: dict[str, int], load: Callable
) -> None:
    save_small(kind, tmp_path, **changes)
    settings = schema.Model(base=str(tmp_path))
    with pytest.raises(UserError, match=r"\.0\..*cannot be quantized to NF4\n.*=lora"):
        load(tmp_path, settings, quantized=True, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
@pytest.mark.parametrize("load", [stream_base, load_base])
def test_nf4_packs_text_layers_and_no_image_tower(
    tmp_path: Path, save_small: Callable, kind: str, load: Callable
) -> None:
    save_small(kind, tmp_path)
    settings = schema.Model(base=str(tmp_path))
    loaded = load(tmp_path, settings, quantized=True, dtype=torch.float32, device=CPU)
    model = loaded.model if load is stream_base else loaded
    packed = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert packed and all("language_model" in name for name in packed)
    adapted = build_method(LORA.model_copy(update={"kind": "qlora"})).attach(model, seed=0)
    target_modules = {n.removeprefix("base_model.model.") for n in adapted_names(adapted)}
    assert target_modules == packed


READ = {
    "gemma3n_text": ["altup.prediction_coefs"],
    "rwkv": ["attention.output", "feed_forward.value"],
}


@pytest.mark.parametrize("kind", READ)
def test_layers_that_other_code_reads_get_no_adapter_and_no_nf4(kind: str) -> None:
    """Clamped in training, or divided in evaluation.

    The pass of this Gemma 3n fails in its first layer, whose like the others are.
    """
    config = AutoConfig.for_model(kind, num_hidden_layers=10)
    packed = nf4_layers(build_meta_model(config))
    adapted = build_method(LORA).attach(build_meta_model(config), seed=0, device=META)
    names = {name.removeprefix("base_model.model.") for name in adapted_names(adapted)}
    described = build_meta_model(config)
    read = {n for n, _ in described.named_modules() if n.endswith(tuple(READ[kind]))}
    assert layers_read_outside_forward(described) - unused_linear_layers(described) == read
    assert packed == names and packed and len(read) >= 10 and not packed & read
    named = LORA.model_copy(update={"target_modules": [READ[kind][0]]})
    with pytest.raises(UserError, match="gets no adapter: other code of the model reads"):
        build_method(named).attach(described, seed=0, device=META)


def test_weights_are_read_by_what_computes_with_them() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with WeightReadRecorder({x.weight: x for x in (first, second)}) as reads:
        assert first.weight.numel() == 4 and first.weight.dtype == second.weight.dtype
        assert not reads.read
        torch.cat([first.weight, second.weight])
    assert reads.read == {first, second}


def test_a_model_of_which_nothing_would_be_in_nf4_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_meta_model(AutoConfig.for_model("llama", num_hidden_layers=1))
    monkeypatch.setattr(quantize, "layers_read_outside_forward", lambda x: set(linear_layers(x)))
    with pytest.raises(UserError, match=r"nothing of 'llama' .* to NF4\n.*=lora"):
        nf4_layers(model)


@pytest.mark.parametrize("load", [stream_base, load_base])
def test_layers_that_other_code_reads_keep_their_dtype_when_loaded(
    tmp_path: Path, save_small: Callable, load: Callable
) -> None:
    save_small("gemma3n_text", tmp_path)
    settings = schema.Model(base=str(tmp_path))
    loaded = load(tmp_path, settings, quantized=True, dtype=torch.bfloat16, device=CPU)
    model = loaded.model if load is stream_base else loaded
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    read = {n for n in kinds if n.endswith(("_coefs", "lm_head"))}
    assert {n for n, kind in kinds.items() if kind == "Linear"} == read
    assert {n for n, kind in kinds.items() if kind == "Linear4bit"} == kinds.keys() - read
    assert all(model.get_submodule(n).weight.dtype == torch.bfloat16 for n in read)


def test_a_package_that_a_model_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise ImportError("X requires the timm library.\n`pip install timm`. Please restart.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", build)
    with pytest.raises(UserError, match="X requires the timm library") as refused:
        build_meta_model(LlamaConfig())
    assert refused.value.fix.startswith("pip install timm, or")
