"""Every mergeable PEFT method merges bit for bit like merge_and_unload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dtrain.core.errors import UserError
from dtrain.merge import stream
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import (
    CombinedAdapters,
    CombineMethod,
    adapter_input,
    combined_input,
)

ALL = "all-linear"
Lora = partial(LoraConfig, r=6, lora_alpha=13)


def llama(tied: bool = False) -> nn.Module:
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=336, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def gpt2(tied: bool = True) -> nn.Module:
    config = GPT2Config(
        vocab_size=200, n_embd=96, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied
    )
    return AutoModelForCausalLM.from_config(config)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(12, 20, 3)
        self.plane = nn.Conv2d(12, 20, 3)
        self.point = nn.Conv2d(12, 20, 1)
        self.space = nn.Conv3d(4, 6, 2)


def wide_convolution() -> nn.Module:
    return nn.ModuleDict({"line": nn.Conv1d(8, 200, 3)})


CONV = ["line", "plane", "point", "space"]
SQUARES = ["c_attn", "c_fc", "c_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], PeftConfig]] = {
    "lora": (llama, Lora(target_modules=ALL)),
    "rslora": (llama, Lora(target_modules=ALL, use_rslora=True)),
    "patterns": (
        llama,
        Lora(
            target_modules=ALL,
            rank_pattern={"^model.layers.1.*up_proj": 3, "q_proj": 9},
            alpha_pattern={"layers.0.self_attn.v_proj": 40},
        ),
    ),
    "dora": (llama, Lora(target_modules=ALL, use_dora=True)),
    "lora bias": (llama, Lora(target_modules=["q_proj"], lora_bias=True)),
    "bias lora_only": (llama, Lora(target_modules=["q_proj"], bias="lora_only")),
    "bias all": (llama, Lora(target_modules=["q_proj"], bias="all")),
    "modules to save": (
        llama,
        Lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
    ),
    "dora of embeddings": (llama, Lora(target_modules=["embed_tokens", "v_proj"], use_dora=True)),
    "dora, tied": (
        partial(llama, tied=True),
        Lora(target_modules=["embed_tokens", "v_proj"], use_dora=True),
    ),
    "fan in fan out": (gpt2, Lora(target_modules=SQUARES, fan_in_fan_out=True)),
    "fan in fan out, dora": (
        gpt2,
        Lora(target_modules=SQUARES, fan_in_fan_out=True, use_dora=True),
    ),
    "adalora": (
        llama,
        AdaLoraConfig(init_r=6, target_r=4, lora_alpha=13, total_step=9, target_modules=["q_proj"]),
    ),
    "convolutions": (Convolutions, Lora(target_modules=CONV)),
    "convolutions, dora": (Convolutions, Lora(target_modules=CONV[:3], use_dora=True)),
    "convolutions, rslora": (Convolutions, Lora(target_modules=CONV, use_rslora=True)),
}
EMBEDDED = (llama, Lora(target_modules=["embed_tokens", "q_proj"]))


def make_case(
    case: tuple[Callable[[], nn.Module], PeftConfig], dtype: torch.dtype, folder: Path
) -> nn.Module:
    """A base in `folder`/base and an adapter with random values in `folder`/adapter; the base."""
    torch.manual_seed(0)
    model = case[0]().to(dtype)
    (folder / "base").mkdir()
    save_file(
        {n: p.detach().clone() for n, p in model.named_parameters()},
        folder / "base" / "model.safetensors",
    )
    (folder / "base" / "config.json").write_text("{}")
    an_adapter(model, case[1], folder / "adapter")
    return model


def an_adapter(model: nn.Module, config: PeftConfig, folder: Path, seed: int = 1) -> None:
    adapted: Any = get_peft_model(deepcopy(model), deepcopy(config))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.05
    adapted.save_pretrained(folder, save_embedding_layers=False)


def ours(folder: Path, *adapters: str, weights: tuple[float, ...] = ()) -> dict[str, Tensor]:
    base, folders = folder / "base", [folder / name for name in adapters or ("adapter",)]
    job = MergeJob(base, folder / "out", source="test")
    factors = weights or [1.0] * len(folders)
    opened = [MergeableAdapter.open(path, job.tensors) for path in folders]
    inputs = [adapter_input(a, w) for a, w in zip(opened, factors, strict=True)]
    job.merge_adapters(inputs)
    return load_file(folder / "out" / "model.safetensors")


def theirs(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    adapted: Any = PeftModel.from_pretrained(deepcopy(model), folder / "adapter")
    return dict(adapted.merge_and_unload().state_dict())


def prune(folder: Path) -> None:
    """As AdaLoRA leaves an adapter whose ranks were cut."""
    path = folder / "adapter_config.json"
    kept = {
        "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True, False, True],
        "model.layers.1.self_attn.q_proj.lora_E": [False, False, True, False, False, False],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": kept}))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, mask in kept.items():
        where = torch.tensor(mask)
        for role in "AEB":
            key = f"base_model.model.{name.removesuffix('E')}{role}"
            cut = tensors[key][:, where] if role == "B" else tensors[key][where]
            tensors[key] = cut.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_merge_equals_peft_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.row_blocks, "__defaults__", (1,))  # 64 rows at a time
    model = make_case(CASES[name], dtype, tmp_path)
    merged, reference = ours(tmp_path), theirs(model, tmp_path)
    before = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(merged[n], reference[n]) and merged[n].dtype == dtype for n in before)
    assert sum(not torch.equal(merged[n], before[n]) for n in before) >= 2


def exact(model: nn.Module, *folders: Path) -> dict[str, Tensor]:
    """PEFT's merge in float64."""
    adapted: Any = model.double()
    for folder in folders:
        adapted = PeftModel.from_pretrained(adapted, folder, autocast_adapter_dtype=False)
        adapted = adapted.double().merge_and_unload()
    return dict(adapted.state_dict())


def error(actual: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> float:
    return float((actual[name].double() - expected[name]).norm())


def test_embeddings_are_rounded_once(tmp_path: Path) -> None:
    model = make_case(EMBEDDED, torch.bfloat16, tmp_path)
    merged, reference = ours(tmp_path), theirs(model, tmp_path)
    truth = exact(model, tmp_path / "adapter")
    name = "model.embed_tokens.weight"
    assert error(merged, truth, name) < error(reference, truth, name)
    rest = merged.keys() - {name}
    assert all(torch.equal(merged[n], reference[n]) for n in rest)


def test_embeddings_in_float32_equal_peft(tmp_path: Path) -> None:
    model = make_case(EMBEDDED, torch.float32, tmp_path)
    merged, reference = ours(tmp_path), theirs(model, tmp_path)
    assert all(torch.equal(merged[n], reference[n]) for n in merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adalora_with_pruned_ranks(dtype: torch.dtype, tmp_path: Path) -> None:
    """Such an adapter PEFT rounds to the base's dtype when it is loaded; here it stays float32."""
    model = make_case(CASES["adalora"], dtype, tmp_path)
    prune(tmp_path / "adapter")
    merged, reference = ours(tmp_path), theirs(model, tmp_path)
    if dtype == torch.float32:
        assert all(torch.equal(merged[n], reference[n]) for n in merged)
        return
    truth = exact(model, tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert error(merged, truth, name) < error(reference, truth, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_are_merged_in_order(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_case(CASES["lora"], dtype, tmp_path)
    an_adapter(model, Lora(target_modules=["q_proj", "lm_head"], r=3), tmp_path / "second", 2)
    merged = ours(tmp_path, "adapter", "second")
    twice: Any = deepcopy(model)
    for name in ("adapter", "second"):
        twice = PeftModel.from_pretrained(twice, tmp_path / name).merge_and_unload()
    reference = twice.state_dict()
    if dtype == torch.float32:
        assert all(torch.equal(merged[n], reference[n]) for n in merged)
        return
    truth = exact(model, tmp_path / "adapter", tmp_path / "second")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert error(merged, truth, name) < error(reference, truth, name)


def test_weights_scale_each_delta(tmp_path: Path) -> None:
    model = make_case(CASES["lora"], torch.float32, tmp_path)
    an_adapter(model, Lora(target_modules=["q_proj"]), tmp_path / "second", 2)
    merged = ours(tmp_path, "adapter", "second", weights=(0.5, -0.25))
    adapted: Any = PeftModel.from_pretrained(deepcopy(model), tmp_path / "adapter", "one")
    adapted.load_adapter(tmp_path / "second", "two")
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            for name, factor in (("one", 0.5), ("two", -0.25)):
                if name in module.scaling:
                    module.set_scale(name, factor)
    reference = adapted.base_model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    assert all(torch.equal(merged[n], reference[n]) for n in merged)


@pytest.mark.parametrize("how", ["linear", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize(("make", "target"), [(llama, "q_proj"), (wide_convolution, "line")])
def test_weighted_merge_equals_peft(
    make: Callable[[], nn.Module],
    target: str,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream.row_blocks, "__defaults__", (1,))  # 64 rows at a time
    model = make_case((make, Lora(target_modules=[target])), torch.float32, tmp_path)
    an_adapter(model, Lora(target_modules=[target]), tmp_path / "second", 2)
    base, factors = tmp_path / "base", (0.7, -0.4)
    folders = [tmp_path / "adapter", tmp_path / "second"]
    job = MergeJob(base, tmp_path / "out", source="test")
    density = 1.0 if how.startswith("dare") else 0.3  # at 1 dare keeps all, so no draw
    opened = [MergeableAdapter.open(folder, job.tensors) for folder in folders]
    job.merge_adapters([combined_input(opened, factors, CombineMethod(how, density))])
    merged = load_file(tmp_path / "out" / "model.safetensors")

    adapted: Any = PeftModel.from_pretrained(deepcopy(model), folders[0], "one")
    adapted.load_adapter(folders[1], "two")
    adapted.add_weighted_adapter(["one", "two"], list(factors), "both", how, density=density)
    adapted.set_adapter("both")
    reference = adapted.merge_and_unload().state_dict()
    assert all(torch.equal(merged[n], reference[n]) for n in merged)


def test_dare_depends_only_on_its_seed(tmp_path: Path) -> None:
    model = make_case(CASES["lora"], torch.float32, tmp_path)
    base = BaseTensors(tmp_path / "base")
    adapter = MergeableAdapter.open(tmp_path / "adapter", base)
    old = model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach()

    def drawn(seed: int, name: str = "model.layers.0.self_attn.q_proj.weight") -> Tensor:
        torch.manual_seed(torch.seed())
        method = CombineMethod("dare_linear", 0.5, seed)
        return CombinedAdapters([adapter], [1.0], method).block_update(name)(old, 0)

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_adapters_that_cannot_be_combined_are_refused(tmp_path: Path) -> None:
    model = make_case(CASES["dora"], torch.float32, tmp_path)
    an_adapter(model, Lora(target_modules=["q_proj"]), tmp_path / "second")
    an_adapter(model, Lora(target_modules=["q_proj"], r=2), tmp_path / "third")
    base = BaseTensors(tmp_path / "base")
    dora, two, three = (
        MergeableAdapter.open(tmp_path / name, base) for name in ("adapter", "second", "third")
    )
    with pytest.raises(UserError, match=r"lm_head|proj\.weight is not a sum"):
        adapter_input(dora, 0.5)
    with pytest.raises(UserError, match="is not plain LoRA"):
        CombinedAdapters([dora, two], [1, 1], CombineMethod("linear"))
    with pytest.raises(UserError, match=r"has ranks 6, 2; linear needs equal ranks"):
        CombinedAdapters([two, three], [1, 1], CombineMethod("linear"))


def test_mixed_transposed_layers_with_a_square_weight_are_refused(tmp_path: Path) -> None:
    config = Lora(target_modules=["c_attn", "c_proj", "lm_head"])
    case = (partial(gpt2, tied=False), config)
    make_case(case, torch.float32, tmp_path)
    with pytest.raises(UserError, match=r"c_proj\.weight is square: nothing says how it is stored"):
        ours(tmp_path)


def test_parallel_shards_give_the_same_bytes(tmp_path: Path) -> None:
    model: Any = make_case(CASES["dora"], torch.bfloat16, tmp_path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    adapter = MergeableAdapter.open(tmp_path / "adapter", BaseTensors(tmp_path / "sharded"))
    manifests = []
    for at_once in (1, 3):
        out = tmp_path / f"out{at_once}"
        job = MergeJob(tmp_path / "sharded", out, source="t", processes=at_once)
        job.merge_adapters([adapter_input(adapter)])
        manifests.append(json.loads((out / "merge.json").read_text()))
    assert manifests[0] == manifests[1] and len(manifests[0]["files"]) > 4


def test_fan_in_fan_out_applies_only_to_transposed_layers(tmp_path) -> None:
    """PEFT sets it right when it loads the adapter of a model of plain layers."""
    model = make_case((llama, Lora(target_modules=["q_proj"])), torch.float32, tmp_path)
    model.config.save_pretrained(tmp_path / "base")
    config = tmp_path / "adapter" / "adapter_config.json"
    plain = ours(tmp_path)
    shutil.rmtree(tmp_path / "out")
    config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": True}))
    turned = ours(tmp_path)
    assert all(torch.equal(turned[name], plain[name]) for name in plain)
