"""In bfloat16, models choose experts and compute under autocast as they do alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.methods.base import build_method
from dtrain.models.by_document import has_state
from dtrain.models.compute_dtype import limit_autocast
from dtrain.models.expert_layers import is_experts, routers
from dtrain.models.load import load_base, silence_transformers
from dtrain.models.loss import transformers_model

CPU, BF16 = torch.device("cpu"), torch.bfloat16
IDS = torch.arange(3, 43)[None]
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "pad_token_id": 0,
}  # fmt: skip
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "num_key_value_heads": 4}  # fmt: skip
# Routers in float32, one that its block multiplies with; in the dtype of the input; a gated delta
# net; Mamba-2 and Mamba.
MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA,
    "deepseek_v2": MLA,
    "glm4_moe": {},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 0},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 2, "moe_shared_expert_intermediate_size": 16,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
    },
    "mamba": {"state_size": 8},
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**COMMON, **MODELS[kind]})
    with silence_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(BF16).save_pretrained(tmp_path)
    return tmp_path


def plain_model(folder: Path, dtype: torch.dtype = BF16) -> Any:
    """The base as transformers computes it, but with the attention of training."""
    settings = schema.Model(base=str(folder), kernels="off")
    return load_base(folder, settings, quantized=False, dtype=dtype, device=CPU)


def attached(folder: Path, method: Any) -> nn.Module:
    """A model in training under ddp, whose adapter changes nothing yet."""
    built = build_method(method)
    base = plain_model(folder, built.base_dtype(BF16))
    model = built.attach(base, seed=0)
    limit_autocast(model, CPU, BF16, base_trains=method.traits.trains_base)
    return model


@contextmanager
def noted(model: nn.Module, names: set[str]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """The arguments and outputs of modules, by name."""
    calls: dict[str, tuple[Any, Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, named, output: calls.update({name: ((args, named), output)})

    hooks = [
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in names
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=IDS, use_cache=False).logits
    return output


def assert_same(found: Any, expected: Any, name: str) -> None:
    """Compare outputs to the bit, with their dtypes."""
    if isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, name)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for key, other in expected.items():
            assert_same(found[key], other, f"{name} {key}")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    else:
        assert found is None or found == expected, name


@KINDS
@pytest.mark.parametrize("router", ["frozen", "train"])
def test_an_adapter_that_changes_nothing_computes_what_the_base_does(
    kind: str, router: Any, folder: Path
) -> None:
    if router == "train" and not routers(plain_model(folder)):
        pytest.skip("no router")
    model = attached(folder, Lora(kind="lora", r=4, dropout=0.0, router=router))
    with torch.autocast("cpu", BF16):
        found = logits(model)
    assert_same(found, logits(plain_model(folder)), kind)
    kept: Any = model
    assert kept(input_ids=IDS, logits_to_keep=torch.tensor([3, 5])).logits.shape[1] == 2
    base = transformers_model(model)
    assert signature(base.forward) == signature(type(base).forward.__get__(base))
    found.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@KINDS
def test_full_fine_tuning_routes_and_keeps_states_as_the_plain_model(
    kind: str, folder: Path
) -> None:
    plain, model = plain_model(folder), attached(folder, Full(kind="full"))
    states = {name for name, module in plain.named_modules() if has_state(module)}
    experts = {name for name, module in plain.named_modules() if is_experts(module)}
    blocks = {name.rpartition(".")[0] for name in experts}
    assert states or blocks
    with noted(plain, states | experts | blocks) as expected:
        logits(plain)
    with torch.autocast("cpu", BF16):
        for name in states | blocks:
            (args, named), output = expected[name]
            with noted(model, experts) as calls:
                result = model.get_submodule(name)(*args, **named)
            for inner, (inputs, _) in calls.items():
                assert_same(inputs, expected[inner][0], inner)  # the chosen experts, their weights
            if name in states:
                assert_same(result, output, name)
        logits(model).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
