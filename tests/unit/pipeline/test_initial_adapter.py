"""An adapter whose training a stage continues: values, and refusals of one that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.merge.provenance import model_fingerprint
from dtrain.methods.base import build_method
from dtrain.models.peft_format import WEIGHTS
from dtrain.pipeline.initial_adapter import open_initial_adapter

OURS = {"kind": "lora", "r": 4, "alpha": 6.0, "modules_to_save": ["model.norm"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Saved by PEFT itself, which knows nothing of dtrain."""
    settings = LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", modules_to_save=["model.norm"]
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def opened(base: Path, adapter: Path, **changes: Any) -> Any:
    method = Lora(**OURS | {"from_adapter": str(adapter)} | changes)
    model = LlamaForCausalLM.from_pretrained(base).requires_grad_(False)
    attached = build_method(method).attach(model, seed=0)
    inputs = SimpleNamespace(base=base, base_fingerprint=model_fingerprint(base))
    setup = SimpleNamespace(
        stage=SimpleNamespace(name="task", method=method), base=base, inputs=inputs,
        recipe=SimpleNamespace(model=SimpleNamespace(base=str(base))), method=build_method(method),
    )  # fmt: skip
    return open_initial_adapter(setup, attached), attached  # type: ignore[arg-type]


def test_every_parameter_gets_its_value(base: Path, adapter: Path) -> None:
    initial, model = opened(base, adapter)
    trains = {n: p for n, p in model.named_parameters() if p.requires_grad}
    stored = load_file(adapter / WEIGHTS)
    assert initial.keys.keys() == trains.keys() and len(stored) == len(trains) == 15
    assert all(torch.equal(initial.read(n), stored[k]) for n, k in initial.keys.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "r: 4 in the adapter, 8 here"),
        ({"alpha": 8.0}, "alpha: 6 in the adapter, 8.0 here"),
        ({"alpha_pattern": {"q_proj": 3.0}}, "alpha_pattern"),
        ({"target_modules": ["q_proj"]}, "tensors of it are not trained by the stage"),
        ({"modules_to_save": []}, "modules_to_save"),
        ({"kind": "rslora"}, "use_rslora: False in the adapter, True here"),
    ],
)
def test_other_settings_are_named(
    changes: dict[str, Any], message: str, base: Path, adapter: Path
) -> None:
    with pytest.raises(UserError, match=r"method\.from_adapter") as caught:
        opened(base, adapter, **changes)
    assert message in str(caught.value)


def test_model_without_the_adapter_is_not_the_one_that_the_stage_starts_from() -> None:
    assert Lora(**OURS).base_when_disabled
    assert not Lora(**OURS, from_adapter="old").base_when_disabled


def test_settings_that_do_not_count_may_differ(base: Path, adapter: Path) -> None:
    opened(base, adapter, dropout=0.5)


def test_pickled_and_non_finite_adapters_are_refused(base: Path, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors[next(iter(tensors))].view(-1)[0] = float("nan")
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError, match="is not finite"):
        opened(base, adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled adapters are not read"):
        opened(base, adapter)


def test_adapter_of_another_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(base)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    content = json.loads((adapter / ADAPTER_CONFIG).read_text())
    path = str(tmp_path / "other")
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": path}))
    with pytest.raises(UserError, match="was trained on another base"):
        opened(base, adapter)
