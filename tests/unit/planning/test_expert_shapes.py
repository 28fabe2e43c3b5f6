"""Mixtures of experts in the plan: counts of transformers' models, and of their adapters."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.methods.base import build_method
from dtrain.planning.activations import layer_bytes
from dtrain.planning.architectures import ARCHITECTURES, read_config, shape_of
from dtrain.planning.check_methods import (
    _copies,
    _lora_parameters,
    _parameters,
    check_adapter,
)
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.known_models import KNOWN, find_config
from dtrain.planning.parameters import layer_parameters
from dtrain.planning.speed import flops_per_token
from dtrain.planning.workload import Workload

META = torch.device("meta")
SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    name: find_config(name)[0]
    for name, sizes in KNOWN.items()
    if sizes.more and sizes.model_type in ARCHITECTURES
} | {
    "some layers without experts": SMALL
    | {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 32, "head_dim": 16}
    | {"decoder_sparse_step": 2},
    "experts for all tokens": SMALL
    | {"model_type": "qwen2_moe", "num_experts": 6, "moe_intermediate_size": 32}
    | {"shared_expert_intermediate_size": 40},
    "norms of heads": SMALL
    | {"model_type": "glm4_moe", "n_routed_experts": 6, "moe_intermediate_size": 32}
    | {"use_qk_norm": True, "first_k_dense_replace": 2, "head_dim": 16},
}


def model_of(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def workload(config: dict[str, Any], **keys: Any) -> Workload:
    return Workload(
        shape=shape_of(config, "here"),
        method=Lora(**{"kind": "lora", "r": 8} | keys),
        engine="ddp",
        ranks=1,
        node_ranks=1,
        shard=1,
        element_bytes=2,
        sequence_length=128,
        micro_batch=1,
        accumulation=1,
        checkpointing=False,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_transformers_saved_again_has_the_same_shape(name: str) -> None:
    """It may rename keys: num_experts of Qwen's becomes num_local_experts."""
    saved = AutoConfig.for_model(**CONFIGS[name]).to_dict()
    assert shape_of(saved, name) == shape_of(CONFIGS[name], name)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_transformers(name: str) -> None:
    config, model = CONFIGS[name], model_of(CONFIGS[name])
    shape, parameters = shape_of(config, name), dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    used = config["num_experts_per_tok"]
    idle = [p for n, p in parameters.items() if ".experts." in n]
    assert shape.parameters == total
    assert shape.active_parameters == total - sum(p[0].numel() * (len(p) - used) for p in idle)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_have_the_names_of_transformers(name: str) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 3}
    names = [name for name, _ in model_of(config).named_parameters()]
    assert sorted(_parameters(shape_of(config, name))) == sorted(names)


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "experts for all tokens"])
@pytest.mark.parametrize(
    "keys",
    [
        {"router": "train", "modules_to_save": ["norm"]},
        {"target_modules": ["down_proj", "q_proj"]},
        {"kind": "dora", "target_modules": ["q_proj"]},
        {"experts": False},
    ],
)
def test_names_that_train_are_those_of_the_run(name: str, keys: dict[str, Any]) -> None:
    """`learning_rate_scales` is compared with them."""
    config = CONFIGS[name] | {"num_hidden_layers": 2}
    method, shape = Lora(**{"kind": "lora", "r": 8} | keys), shape_of(config, name)
    model = model_of(config).requires_grad_(False)
    adapted = build_method(method).attach(model, seed=0, device=META)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    linears = check_adapter(method, shape)
    names = [*_lora_parameters(method, shape, linears), *_copies(method, shape)]
    assert sorted(names) == sorted(trained)


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "experts for all tokens"])
@pytest.mark.parametrize(
    "end", ["experts", "gate_up_proj", "gate", "router", "o_proj", "down_proj"]
)
def test_the_plan_lets_those_modules_train_whole_that_a_run_does(name: str, end: str) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 2}
    keys = {"modules_to_save": [end], "target_modules": ["q_proj"]}
    method = Lora(kind="lora", r=8, **keys)
    refused = []
    for check in (
        lambda: check_adapter(method, shape_of(config, name)),
        lambda: build_method(method).attach(model_of(config), seed=0, device=META),
    ):
        try:
            check()
        except UserError as error:
            refused.append(error.where)
    assert refused in ([], ["method.modules_to_save"] * 2)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"])
@pytest.mark.parametrize("keys", [{}, {"experts": False}, {"router": "train"}])
def test_adapters_are_counted_as_they_are_attached(name: str, keys: dict[str, Any]) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 2}
    planned = workload(config, **keys)
    model = model_of(config).requires_grad_(False)
    adapted = build_method(planned.method).attach(model, seed=0, device=torch.device("meta"))
    trains = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert planned.trainable == sum(trains)


def test_parameters_of_a_layer_are_divided_as_engines_do() -> None:
    config = CONFIGS["openai/gpt-oss-20b"] | {"num_hidden_layers": 1}
    specs = layer_parameters(workload(config, experts=False))
    model = model_of(config)
    layer = dict(model.model.layers[0].named_parameters())
    base = [(x.rows, x.columns) for x in specs if not x.trains]
    assert sum(rows * columns for rows, columns in base) == sum(p.numel() for p in layer.values())
    assert all((32, p[0].numel()) in base for n, p in layer.items() if "experts" in n)


def test_time_and_activations_depend_on_active_experts() -> None:
    few, config = workload(CONFIGS["Qwen/Qwen3-30B-A3B"]), CONFIGS["Qwen/Qwen3-30B-A3B"]
    more = workload(config | {"num_experts": 256})
    assert flops_per_token(more) == pytest.approx(flops_per_token(few))
    assert layer_bytes(more) == layer_bytes(few)
    twice = workload(config | {"num_experts_per_tok": 16})
    assert flops_per_token(twice) > 1.3 * flops_per_token(few)
    assert layer_bytes(twice) > 1.3 * layer_bytes(few)
    packed = replace(few, method=Lora(kind="qlora", r=8))
    stored = sum(x.kept * x.elements for x in layer_parameters(packed) if not x.trains)
    assert stored < 0.3 * sum(x.kept * x.elements for x in layer_parameters(few) if not x.trains)


def test_a_clamped_activation_saves_more() -> None:
    """As autograd of transformers' experts: gate and up, and four tensors computed from them."""
    config = CONFIGS["openai/gpt-oss-20b"]
    plain, active = workload(config | {"model_type": "mixtral"}), 4
    more = layer_bytes(workload(config)) - layer_bytes(plain)
    assert more == pytest.approx(2 * 3 * active * config["intermediate_size"], rel=0.1)


def test_a_rank_under_fsdp2_has_whole_experts() -> None:
    config = CONFIGS["openai/gpt-oss-20b"]  # 32 experts
    one = replace(workload(config), engine="fsdp2", method=Full(kind="full"))
    few, many = (build_engine_model(replace(one, ranks=n, shard=n)) for n in (32, 48))
    assert few.optimizer_bytes == pytest.approx(8 * one.trainable / 32, rel=0.01)
    assert many.optimizer_bytes == pytest.approx(few.optimizer_bytes, rel=0.03)
    assert many.gradient_bytes == pytest.approx(few.gradient_bytes, rel=0.03)


def test_full_fine_tuning_trains_attention_sinks() -> None:
    config = CONFIGS["openai/gpt-oss-20b"] | {"num_hidden_layers": 2}
    job = replace(workload(config), method=Full(kind="full"))
    names = dict(model_of(config).named_parameters())
    assert any(name.endswith("sinks") for name in names)
    trained = sum(p.numel() for name, p in names.items() if ".router." not in name)
    assert job.trainable == trained


QWEN, RENAMED = CONFIGS["some layers without experts"], {"num_experts": "num_local_experts"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7, of 6 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is not a whole number above 0: 0"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is not a whole number above 0: null"),
        ({"num_experts_per_tok": "2"}, 'num_experts_per_tok is not a whole number above 0: "2"'),
        ({"num_experts": -4}, "num_experts is not a whole number above 0: -4"),
        ({"num_experts": True}, "num_experts is not a whole number above 0: true"),
        ({"num_experts": 4.0}, "num_experts is not a whole number above 0: 4.0"),
        ({"num_experts": 10**12}, "num_experts is not a whole number above 0 below 65,536: 10000"),
        ({"moe_intermediate_size": "16"}, "moe_intermediate_size is not a whole number"),
        ({"hidden_size": "32x"}, "hidden_size is not a whole number"),
    ],
)
def test_a_wrong_size_of_experts_is_named(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    # a decoder alone, one in a multimodal model, and one whose number of experts has another name
    other = {RENAMED.get(key, key): value for key, value in (QWEN | wrong).items()}
    renamed = message.replace("num_experts is", "num_local_experts is")
    for config, says in (
        (QWEN | wrong, message),
        ({"model_type": "wrapper", "text_config": QWEN | wrong}, message),
        (other, renamed),
    ):
        path.write_text(json.dumps(config))
        with pytest.raises(UserError, match=re.escape(says)) as error:
            read_config(path)  # what check, plan and run begin with
        assert error.value.where == str(path)


def test_right_sizes_of_experts_are_read(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path / "config.json") == config, name
        saved = AutoConfig.for_model(**config).to_dict()
        (tmp_path / "config.json").write_text(json.dumps(saved, default=str))
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["some layers without experts", "experts for all tokens"])
def test_a_mixture_of_no_experts_is_a_dense_model(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name] | {"num_experts": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(read_config(tmp_path / "config.json"), name)
    assert not shape.experts
    assert shape.parameters == sum(p.numel() for p in model_of(config).parameters())


def test_a_layer_of_a_mixture_is_named_by_its_whole_name() -> None:
    shape = shape_of(CONFIGS["some layers without experts"], "here")
    whole = ["model.layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"]
    (named,) = check_adapter(Lora(kind="lora", r=8, target_modules=whole), shape)
    assert named.name == "self_attn.q_proj"
    with pytest.raises(UserError, match=r"no linear layer is named 'model.layers.9.self_attn"):
        check_adapter(Lora(kind="lora", target_modules=["model.layers.9.self_attn.q_proj"]), shape)
