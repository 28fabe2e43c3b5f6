"""Shapes that the plan reads from a model on the meta device: counts, adapters, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.methods.base import build_method
from dtrain.models import expert_nf4
from dtrain.models.expert_layers import router_layers
from dtrain.models.meta_model import linear_layers
from dtrain.models.sharded_loading import stream_base
from dtrain.planning.activations import saved_bytes
from dtrain.planning.architectures import shape_of
from dtrain.planning.check_methods import check_adapter
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.known_models import find_shape
from dtrain.planning.parameters import outer_parameters
from dtrain.planning.shapes import ModelShape
from dtrain.planning.speed import flops_per_token
from dtrain.planning.workload import Workload
from dtrain.simulation.child import describe
from dtrain.simulation.model_shape import describe_model

SMALL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99,
    "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HYBRID = SMALL | EXPERTS | {
    "model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 40, "head_dim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
LATENT = SMALL | EXPERTS | {
    "model_type": "deepseek_v2", "n_routed_experts": 6, "n_shared_experts": 1, "kv_lora_rank": 24,
    "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
CONVOLUTIONS = SMALL | {
    "model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention", "conv"],
}  # fmt: skip
# PEFT has no adapter for Mamba-2's out_proj
STATES = {
    "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99,
    "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1,
}  # fmt: skip
BIASED_NORMS = SMALL | {"model_type": "gpt_neox"}
TRANSPOSED = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 32}
CONFIGS = {
    "hybrid": HYBRID, "latent": LATENT, "convolutions": CONVOLUTIONS, "states": STATES,
    "biased norms": BIASED_NORMS, "transposed": TRANSPOSED,
}  # fmt: skip
UNIFORM = SMALL | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 32}
UNIFORM |= {"moe_intermediate_size": 48}  # no matrix is square


def model_of(config: dict[str, Any], device: str = "meta") -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def described(config: dict[str, Any]) -> ModelShape:
    return describe_model(AutoConfig.for_model(**config))


def workload(shape: ModelShape, **keys: Any) -> Workload:
    settings = {
        "method": Lora(kind="lora", r=8), "engine": "ddp", "ranks": 1, "node_ranks": 1, "shard": 1,
        "element_bytes": 2, "sequence_length": 128, "micro_batch": 1, "accumulation": 1,
        "checkpointing": False, "kernels": shape.kernels,
    }  # fmt: skip
    return Workload(shape=shape, **(settings | keys))


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_and_adapters_are_the_models_own(name: str) -> None:
    config, model = CONFIGS[name], model_of(CONFIGS[name])
    shape, parameters = described(config), dict(model.named_parameters())
    total = sum(p.numel() for p in parameters.values())
    idle = [p[2:] for n, p in parameters.items() if ".experts." in n]
    assert shape.parameters == total
    assert shape.active_parameters == total - sum(p.numel() for p in idle)
    method = build_method(Lora(kind="lora", r=8))
    adapted = method.attach(model, seed=0, device=torch.device("meta"))
    trains = [p.numel() for p in adapted.parameters() if p.requires_grad]
    assert workload(shape).trainable == sum(trains)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_fine_tuning_trains_all_but_the_routers(name: str) -> None:
    shape, model = described(CONFIGS[name]), model_of(CONFIGS[name])
    job = workload(shape, method=Full(kind="full"))
    routers = sum(model.get_submodule(n).weight.numel() for n in router_layers(model))
    assert job.trainable == shape.parameters - routers
    head = shape.vocabulary * shape.hidden
    matrices = sum(m.weight.numel() for m in linear_layers(model).values()) - head
    idle = shape.parameters - shape.active_parameters
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert job.trained_active_elements == matrices + experts - idle


@pytest.mark.parametrize("name", ["states", "hybrid", "latent"])
def test_nf4_takes_the_bytes_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    model_of(CONFIGS[name], "cpu").to(torch.bfloat16).save_pretrained(tmp_path)
    settings = schema.Model(base=str(tmp_path))
    base = stream_base(
        tmp_path, settings, quantized=True, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    adapted = build_method(Lora(kind="qlora", r=8)).attach(base.model, seed=0)
    base.materialize(adapted)
    kept = sum(p.numel() * p.element_size() for p in adapted.parameters())
    job = workload(described(CONFIGS[name]), method=Lora(kind="qlora", r=8))
    engine = build_engine_model(job)
    counted = sum(n * sum(x.kept * x.elements for x in layer) for n, layer in engine.kinds)
    assert counted + sum(x.kept * x.elements for x in engine.outer) == kept
    modules = [*adapted.modules()]
    packed = [m.quant_state.shape for m in modules if isinstance(m, Linear4bit)]
    packed += [x.shape for m in modules for x in getattr(m, expert_nf4.STATES, {}).values()]
    assert job.shape.packed_elements == sum(map(prod, packed))


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("hybrid", ["norm", "conv1d"]),
        ("hybrid", ["layers.3.self_attn.q_norm", "linear_attn.norm"]),
        ("states", ["mixer.out_proj", "embeddings"]),
        ("biased norms", ["embed_in", "layernorm", "lm_head"]),
    ],
)
def test_modules_that_train_whole_are_the_models_own(name: str, ends: list[str]) -> None:
    shape, model = described(CONFIGS[name]), model_of(CONFIGS[name])
    only_adapters = workload(shape).trainable
    named = [m for n, m in model.named_modules() if n.endswith(tuple(ends))]
    job = workload(shape, method=Lora(kind="lora", r=8, modules_to_save=ends))
    copies = sum(p.numel() for m in named for p in m.parameters())
    assert job.trainable == only_adapters + copies
    assert job.trains_matrices == (name != "hybrid")
    engine = build_engine_model(job)
    layers = sum(n * sum(x.elements for x in layer if x.trains) for n, layer in engine.kinds)
    assert layers + sum(x.elements for x in engine.outer if x.trains) == job.trainable


def test_tied_matrices_of_any_name_can_train_as_one() -> None:
    """The plan knows the names of some; the run asks the model."""
    method = Lora(kind="lora", r=8, modules_to_save=["wte", "lm_head"])
    assert check_adapter(method, described(TRANSPOSED))


def test_a_name_that_no_module_has_is_refused_with_the_models_own() -> None:
    job = workload(described(BIASED_NORMS), method=Lora(kind="lora", modules_to_save=["wte"]))
    with pytest.raises(UserError, match="no module is named 'wte'") as caught:
        job.trainable  # noqa: B018
    assert "embed_in" in str(caught.value.fix)


@pytest.mark.parametrize("name", ["biased norms", "transposed"])
def test_norms_are_those_of_the_model_and_not_their_biases(name: str) -> None:
    shape = described(CONFIGS[name])
    assert (shape.norms, shape.norm_elements) == (2, 128)


def test_a_norm_as_wide_as_a_multiple_of_the_vocabulary_is_no_matrix() -> None:
    shape = described(TRANSPOSED)
    rows = [(x.rows, x.columns) for x in outer_parameters(workload(shape))]
    assert rows[:2] == [(32, 64), (64, 1)]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_engines_keep_every_parameter_of_layers_that_differ(engine: str) -> None:
    shape = described(HYBRID)
    kept = build_engine_model(workload(shape, engine=engine)).loaded_bytes
    job = workload(shape, engine=engine)
    width = 2 if job.capabilities.is_deepspeed else 4
    assert kept == 2 * shape.parameters + width * job.trainable
    assert build_engine_model(job).peak_memory().peak > kept


def one_layer(job: Workload) -> float:
    """Bytes that one more layer saves."""
    more = replace(job, shape=replace(job.shape, layers=job.shape.layers + 1))
    return saved_bytes(more) - saved_bytes(job)


def test_layers_save_what_their_kind_saves() -> None:
    attention = described(HYBRID | {"layer_types": ["full_attention"] * 4})
    states = described(HYBRID | {"layer_types": ["linear_attention"] * 4})
    mixed = described(HYBRID)  # three of the one, one of the other
    rotary = 2 * 2 * mixed.head_size * 128
    one = [one_layer(workload(shape)) for shape in (states, attention)]
    assert saved_bytes(workload(mixed)) == 3 * one[0] + one[1] + rotary
    tokens = 2**20  # attention alone grows with the sequence
    assert flops_per_token(workload(states, sequence_length=tokens)) < 0.1 * flops_per_token(
        workload(attention, sequence_length=tokens)
    )


def test_a_known_architecture_is_described_as_it_is_computed() -> None:
    known, read = shape_of(UNIFORM, "here"), described(UNIFORM)
    assert (known.parameters, known.active_parameters, known.kernels) == (
        read.parameters, read.active_parameters, read.kernels,
    )  # fmt: skip
    assert sorted(x.name for x in known.linears) == sorted(x.name for x in read.linears)


def test_a_child_process_describes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HYBRID))
    assert find_shape(str(tmp_path))[0] == described(HYBRID)


def test_what_cannot_be_built_is_reported_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llamma"}')
    with pytest.raises(UserError, match="unknown model_type 'llamma'") as caught:
        find_shape(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value.where)


def test_a_last_norm_without_a_weight_is_reported() -> None:
    with pytest.raises(UserError, match="whose last norm has no weight"):
        described(SMALL | {"model_type": "olmo"})


def test_the_plan_does_not_ask_to_trust_code_that_it_does_not_run() -> None:
    content = {"model_type": "of its own", "auto_map": {"AutoConfig": "own.Config"}}
    with pytest.raises(UserError, match="the plan does not run a model's own Python code"):
        describe(content, "here")


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router() -> None:
    shape = described(HYBRID | {"shared_expert_intermediate_size": 6})
    assert {"mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"} <= {
        x.name for x in shape.linears
    }
    assert shape.router == (6, 64)
