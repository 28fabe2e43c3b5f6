"""LoRA's relatives against PEFT's own: the same losses at every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dtrain.config.methods import TRAITS, parse_method
from dtrain.config.schema import Model, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.optimizers import build_optimizer, set_learning_rate
from dtrain.methods.base import MethodContext, build_method
from dtrain.models.dora import base_matrix
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.load import load_base
from dtrain.objectives.base import adapters_disabled

STEPS, RATE = 6, 0.02
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return folder


def base(folder: Path, kind: str) -> PreTrainedModel:
    options = Model(base=str(folder), kernels="off")
    in_nf4 = TRAITS[kind].quantizes_base
    return load_base(folder, options, quantized=in_nf4, dtype=torch.float32, device=CPU)


def context(folder: Path) -> MethodContext:
    world = World(0, 1, 0, 1, CPU, dist.new_group())
    return MethodContext(folder, "the base", torch.float32, folder / "cache", world)


def ours(folder: Path, method: dict[str, Any], *, kernels: bool) -> nn.Module:
    built = build_method(parse_method({"r": 4, "alpha": 8.0, "dropout": 0.0, **method}))
    model = built.attach(base(folder, method["kind"]), seed=1)
    built.on_attached(model, context(folder))
    built.on_weights_loaded(model)
    if kernels:
        assert patch_modules(model)["adapted layers"] == 14
    return model


def pefts(folder: Path, kind: str, ours: nn.Module, **settings: Any) -> nn.Module:
    """PEFT's model, starting with our A and B."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base(folder, kind), LoraConfig(**config | settings))
    ours_by_name = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.shape == ours_by_name[name].shape
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(ours_by_name[name])
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)


def losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    tokens = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(2))
    values = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("rslora", {"use_rslora": True}),
        ("dora", {"use_dora": True}),
        ("qdora", {"use_dora": True}),
        ("pissa", {"init_lora_weights": "pissa"}),
        ("olora", {"init_lora_weights": "olora"}),
    ],
)
def test_losses_are_pefts(folder: Path, kind: str, config: dict[str, Any], kernels: bool) -> None:
    model = ours(folder, {"kind": kind}, kernels=kernels)
    other = pefts(folder, kind, model, **config)
    found, expected = losses(model, adam(model)), losses(other, adam(other))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found[-1] < found[0] - 0.1, "nothing was learned: this would show nothing"


def test_lora_plus_is_pefts(folder: Path) -> None:
    method = {"kind": "lora", "r": 4, "alpha": 8.0, "dropout": 0.0, "loraplus_lr_ratio": 4.0}
    model = ours(folder, method, kernels=False)
    other = pefts(folder, "lora", model)
    stage = Stage.model_validate(
        {
            "name": "task",
            "kind": "sft",
            "method": method,
            "data": {"sources": [{"path": "a.json"}]},
            "train": {"global_batch_size": 1, "steps": STEPS, "weight_decay": 0.0},
        }
    )
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer([n for n, _ in trained], [p for _, p in trained], stage, model)
    set_learning_rate(optimizer, RATE)
    other_optimizer = create_loraplus_optimizer(
        other, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=4.0
    )
    found, expected = losses(model, optimizer), losses(other, other_optimizer)
    assert found == pytest.approx(expected, abs=1e-5)
    plain = ours(folder, method | {"loraplus_lr_ratio": 1.0}, kernels=False)
    assert abs(losses(plain, adam(plain))[-1] - found[-1]) > 1e-3


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_exported_factors_are_a_lora_of_the_base(folder: Path, kind: str, tmp_path: Path) -> None:
    """As PEFT's path_initial_model_for_weight_conversion writes it."""
    method = build_method(parse_method({"kind": kind, "r": 4, "dropout": 0.1}))
    model = method.attach(base(folder, kind), seed=1)
    method.on_attached(model, context(folder))
    tokens = torch.arange(20)[None]
    logits = base(folder, kind).eval()(tokens).logits
    assert torch.allclose(model.eval()(tokens).logits, logits, rtol=0, atol=1e-5)
    losses(model.eval(), adam(model))
    assert not torch.allclose(model(tokens).logits, logits, rtol=0, atol=0.1)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    method.save(tmp_path / "adapter", model, trained)
    loaded = PeftModel.from_pretrained(base(folder, kind), tmp_path / "adapter").eval()
    assert loaded.peft_config["default"].r == 8
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    with adapters_disabled(model):
        assert torch.equal(model(tokens).logits, logits)


def test_loftq_starts_closer_to_the_base_than_nf4(folder: Path) -> None:
    tokens = torch.arange(20)[None]
    whole = base(folder, "lora").eval()
    model = ours(folder, {"kind": "loftq", "alpha": 4.0}, kernels=False).eval()
    logits = whole(tokens).logits
    started = (model(tokens).logits - logits).norm()
    with adapters_disabled(model):
        rounded = (model(tokens).logits - logits).norm()
    assert started < 0.9 * rounded
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    lost = whole.model.layers[0].mlp.up_proj.weight - base_matrix(layer.base_layer)
    expected = _low_rank_decomposition(lost, reduced_rank=4)  # PEFT's, whose scale is 1
    product = layer.lora_B.default.weight @ layer.lora_A.default.weight
    assert torch.allclose(product, expected["L"] @ expected["R"], atol=1e-5)


def test_more_singular_values_than_a_layer_has_are_refused(folder: Path) -> None:
    method = build_method(parse_method({"kind": "pissa", "r": 17}))
    with pytest.raises(UserError, match="k_proj has only 16 singular values"):
        method.attach(base(folder, "pissa"), seed=1)


def test_damaged_factors_are_computed_again(folder: Path, tmp_path: Path) -> None:
    method = build_method(parse_method({"kind": "pissa", "r": 4}))

    def first_values() -> dict[str, torch.Tensor]:
        model = method.attach(base(folder, "pissa"), seed=1)
        method.on_attached(model, replace(context(folder), cache=tmp_path))
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    before = first_values()
    paths = sorted(tmp_path.glob("*/*.safetensors"))
    damaged = bytearray(paths[3].read_bytes())
    damaged[-5] ^= 1
    paths[3].write_bytes(damaged)
    paths[5].unlink()
    again = first_values()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_dora_refuses_rows_without_a_direction(folder: Path) -> None:
    method = build_method(parse_method({"kind": "dora"}))
    model = base(folder, "dora")
    model.model.layers[1].mlp.up_proj.weight[3] = 0
    adapted = method.attach(model, seed=1)
    with pytest.raises(UserError, match=r"1 of the 48 rows of .*up_proj are zero"):
        method.on_weights_loaded(adapted)


def test_loading_again_keeps_a_restored_magnitude(folder: Path) -> None:
    """Engines load the blocks once more after a checkpoint was restored."""
    method = build_method(parse_method({"kind": "dora"}))
    adapted = method.attach(base(folder, "dora"), seed=1)
    method.on_weights_loaded(adapted)
    magnitude = next(p for n, p in adapted.named_parameters() if "magnitude" in n)
    magnitude.data.fill_(3.0)
    method.on_weights_loaded(adapted)
    assert bool((magnitude == 3.0).all())
