"""Bases in MXFP4 and fp8: their values are loaded, merged, compared and verified as bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

from dtrain.config import schema
from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.diff import diff_models
from dtrain.merge.merge import MergeJob, check_mergeable
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.merge.verify import verify_model
from dtrain.methods.base import build_method
from dtrain.models.check_base import open_model
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.sharded_loading import stream_base
from dtrain.models.stored_tensors import ModelTensors

CPU = torch.device("cpu")
IDS = torch.arange(3, 23)[None]
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
HIDDEN, EXPERTS = 64, 3
GPT_OSS: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2,
    "num_local_experts": EXPERTS, "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
BLOCK = 32


def to_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """[E, in, out] → codes [E, out, in / 32, 16] and exponents, by OCP's rule."""
    groups = values.transpose(1, 2).unflatten(-1, (-1, 32)).float()
    exponents = groups.abs().amax(-1, keepdim=True).log2().floor() - 2
    scaled = groups / exponents.exp2()
    codes = (scaled.abs().clamp(max=6).unsqueeze(-1) - FP4).abs().argmin(-1)
    codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents.squeeze(-1) + 127).to(torch.uint8)


def to_fp8(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """[o, i] → codes, and the factor of each block, of which the last may be smaller."""
    rows, columns = (-(n // -block) for n in values.shape)
    codes, factors = torch.empty_like(values, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            here = tuple(slice(n * block, (n + 1) * block) for n in (row, column))
            factors[row, column] = values[here].abs().max() / 448
            codes[here] = (values[here] / factors[row, column]).to(codes.dtype)
    return codes, factors


def save_random(kind: str, settings: dict[str, Any], folder: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None], **quantization: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def gpt_oss(tmp_path: Path) -> Path:
    """A base in MXFP4, with codes and scales in files of their own."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            codes, exponents = to_mxfp4(tensors.pop(name))
            tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}

    folder = save_random("gpt_oss", GPT_OSS, tmp_path / "base")
    rewrite(folder, quantize, quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    scales = {n: t for n, t in tensors.items() if n.endswith("_scales")}
    files = {"a.safetensors": {n: tensors[n] for n in tensors.keys() - scales.keys()}}
    files["b.safetensors"] = scales
    for name, content in files.items():
        save_file(content, folder / name, metadata={"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {n: file for file, content in files.items() for n in content},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(params=["blocks", "whole"])
def llama(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base in fp8, with a factor for each block or one for each tensor."""

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("proj.weight")]:
            size = BLOCK if request.param == "blocks" else max(tensors[name].shape)
            codes, factors = to_fp8(tensors[name].float(), size)
            if request.param == "whole":
                factors = factors.squeeze().to(torch.bfloat16)
                tensors[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
            tensors |= {name: codes, f"{name}_scale_inv": factors}

    folder = save_random("llama", LLAMA, tmp_path / "base")
    size = [BLOCK, BLOCK] if request.param == "blocks" else None
    return rewrite(folder, quantize, quant_method="fp8", weight_block_size=size)


def stream(folder: Path, *, quantized: bool = False) -> Any:
    settings = schema.Model(base=str(folder))
    return stream_base(folder, settings, quantized=quantized, dtype=torch.float32, device=CPU)


def loaded(folder: Path) -> Any:
    base = stream(folder)
    base.materialize(base.model)
    return base.model.eval()


def plain(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def merge(folder: Path, out: Path, *, quantized: bool = False) -> tuple[Any, Path]:
    """Train nothing, but give B values; merge. Returns the adapted model and its adapter."""
    method = build_method(Lora(kind="qlora" if quantized else "lora", r=4, dropout=0.0))
    base = stream(folder, quantized=quantized)
    model: Any = method.attach(base.model, seed=1, device=CPU)
    base.materialize(model)
    patch_modules(model)
    check_mergeable(folder, method.changed_tensors(model))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    method.save(out.parent / "adapter", model, {n: p.detach() for n, p in trained.items()})
    job = MergeJob(folder, out, source="test")
    nf4 = Nf4Base(job.tensors, torch.float32) if quantized else None
    adapter = MergeableAdapter.open(out.parent / "adapter", job.tensors)
    job.merge_adapters([adapter_input(adapter, quantized_base=nf4)])
    return model.eval(), out.parent / "adapter"


def test_mxfp4_is_loaded_as_transformers_does(gpt_oss: Path) -> None:
    expected = plain(gpt_oss, quantization_config=Mxfp4Config(dequantize=True)).state_dict()
    actual = loaded(gpt_oss).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in actual.items())


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_merged_into_mxfp4_computes_what_its_adapter_does(
    gpt_oss: Path, tmp_path: Path, quantized: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    model, adapter = merge(gpt_oss, out, quantized=quantized)
    merged = plain(out)
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(out).parameters()} == {
        torch.bfloat16
    }
    torch.testing.assert_close(logits(merged), logits(model), rtol=0.05, atol=0.05)
    if not quantized:
        base = plain(gpt_oss, quantization_config=Mxfp4Config(dequantize=True))
        peft = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        names = [n for n, _ in peft.named_parameters() if "_proj" in n]
        for name in names:
            expected = peft.get_parameter(name).detach().bfloat16().float()
            torch.testing.assert_close(merged.get_parameter(name), expected, rtol=8e-3, atol=1e-6)
    assert "written in bfloat16" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not verify_model(out).problems and not verify_model(gpt_oss).problems
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in ModelTensors(out).values())
    diff = diff_models(gpt_oss, out)
    assert not diff.incomparable and any("experts.down_proj" in x.name for x in diff.changes)


def test_fp8_is_loaded_rounded_to_bfloat16(llama: Path) -> None:
    tensors, model = load_file(llama / "model.safetensors"), loaded(llama)
    names = [n for n in tensors if n.endswith("proj.weight")]
    assert len(names) == 7 * LLAMA["num_hidden_layers"]
    for name in names:
        codes, factors = tensors[name].float(), tensors[f"{name}_scale_inv"].float()
        if factors.dim():
            factors = factors.repeat_interleave(BLOCK, 0)[: codes.shape[0]]
            factors = factors.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]
        expected = (codes * factors).bfloat16().float()
        assert torch.equal(model.get_parameter(name), expected), name


def test_a_model_merged_into_fp8_computes_what_its_adapter_does(
    llama: Path, tmp_path: Path
) -> None:
    model, _ = merge(llama, tmp_path / "merged")
    merged = plain(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0.05, atol=0.05)
    assert not verify_model(tmp_path / "merged").problems
    assert [ModelTensors(x).formats for x in (llama, tmp_path / "merged")] == [["fp8"], []]


def drop(suffix: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in sorted(tensors) if name.endswith(suffix))]

    return change


def cut(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    tensors[name] = tensors[name].flatten()[:2].clone()


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


@pytest.mark.parametrize("llama", ["blocks"], indirect=True)
@pytest.mark.parametrize(
    "change, quantization, message",
    [
        (
            drop("scale_inv"),
            {"quant_method": "fp8", "weight_block_size": [32, 32]},
            r"weight \(F8_E4M3 \[.*\]\) has no .*weight_scale_inv",
        ),
        (cut, {"quant_method": "fp8", "weight_block_size": [32, 32]}, r"do not fit together"),
        (nothing, {"quant_method": "fp8"}, r"says no weight_block_size of two numbers"),
        (nothing, {"quant_method": "awq"}, r"already quantized \(awq\); mxfp4 and fp8 are read"),
    ],
)
def test_codes_that_do_not_fit_are_refused_before_they_are_loaded(
    llama: Path, change: Any, quantization: dict[str, Any], message: str
) -> None:
    rewrite(llama, change, **quantization)
    with pytest.raises(UserError, match=message):
        open_model(llama)
    with pytest.raises(UserError, match=message):
        stream(llama)


def write_fp8(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Files of fp8 without a size of blocks."""
    folder.mkdir()
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "shape, grid",
    [
        ([4], [1]),
        ([4], [2]),
        ([], []),
        ([0, 0], []),
        ([4, 0], [1, 1]),
        ([4, 4], [0]),
        ([4, 4], [0, 4]),
        ([2, 2, 4, 4], [2, 2, 1, 1]),
        ([2, 2, 4, 4], []),
    ],
)
def test_fp8_of_odd_shapes_is_refused(shape: list[int], grid: list[int], tmp_path: Path) -> None:
    codes = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    folder = write_fp8(
        tmp_path / "base", {"m.weight": codes, "m.weight_scale_inv": torch.ones(grid)}
    )
    with pytest.raises(UserError, match=r"m\.weight .* do not fit together"):
        ModelTensors(folder)


@pytest.mark.parametrize(
    "name, dtype, other",
    [
        ("mlp.up_proj.weight", torch.float8_e4m3fn, "mlp.up_proj.weight_scale_inv"),
        ("experts.down_proj", torch.float8_e4m3fn, "experts.down_proj_scale_inv"),
        ("mlp.up_proj.weight_scale_inv", torch.float32, "mlp.up_proj.weight"),
        ("experts.down_proj_blocks", torch.uint8, "experts.down_proj_scales"),
        ("experts.down_proj_scales", torch.uint8, "experts.down_proj_blocks"),
    ],
)
def test_codes_without_scales_and_scales_without_codes_are_refused(
    name: str, dtype: torch.dtype, other: str, tmp_path: Path
) -> None:
    tensors = {"m.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    tensors |= {"m.weight_scale_inv": torch.ones(()), name: torch.zeros(2, 2).to(dtype)}
    folder = write_fp8(tmp_path / "base", tensors)
    (folder / "tokenizer.json").write_text("{}")
    for read in (open_model, ModelTensors, verify_model):
        with pytest.raises(UserError, match=rf"{name} .* has no {other}\n.*download") as caught:
            read(folder)
        assert caught.value.where == str(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_a_float_of_eight_bits_is_refused_whatever_its_name(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {"experts.down_proj": torch.zeros(2, 2).to(dtype)}
    folder = write_fp8(tmp_path / "base", tensors)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"experts\.down_proj is stored as F8_E[45]M[23], so"):
        open_model(folder)


@pytest.mark.parametrize("scales", ["m.weight_scale", "m.scale", "m.weight_scale_2"])
def test_fp8_with_scales_of_other_names_is_verified_and_compared_as_it_is(
    scales: str, tmp_path: Path
) -> None:
    """Such as compressed-tensors and modelopt write: some scales are in 8 bits themselves."""
    tensors = {x: torch.ones(2, 2).to(torch.float8_e4m3fn) for x in ("m.weight", scales)}
    old = write_fp8(tmp_path / "old", tensors)
    new = write_fp8(tmp_path / "new", {**tensors, "m.weight": tensors["m.weight"].flatten()})
    assert ModelTensors(old).keys() == tensors.keys() and not ModelTensors(old).formats
    assert verify_model(old).problems == []
    assert not diff_models(old, old).changes and not diff_models(old, old).incomparable
    assert any("m.weight" in str(x) for x in diff_models(old, new).incomparable)


def test_fp8_experts_with_a_scale_each_are_read(tmp_path: Path) -> None:
    codes = torch.full((3, 4, 6), 2.0).to(torch.float8_e4m3fn)
    one, two = torch.tensor([1.0, 2, 4]).view(3, 1, 1), torch.arange(1.0, 7).view(3, 2, 1)
    tensors = {
        "experts.down_proj": codes,
        "experts.down_proj_scale_inv": one,
        "experts.down_proj_activation_scale": torch.ones(3),
        "experts.gate_up_proj": codes.clone(),
        "experts.gate_up_proj_scale_inv": two,
    }
    read = ModelTensors(write_fp8(tmp_path / "base", tensors))
    assert read.keys() == {"experts.down_proj", "experts.gate_up_proj"}
    assert torch.equal(read.read("experts.down_proj"), (2 * one).expand(3, 4, 6).bfloat16())
    halves = two.repeat_interleave(2, 1).expand(3, 4, 6)
    assert torch.equal(read.read("experts.gate_up_proj"), (2 * halves).bfloat16())


def test_fp8_tensors_of_a_module_share_an_activation_scale(tmp_path: Path) -> None:
    tensors = {f"m.{x}": torch.ones(2, 2).to(torch.float8_e4m3fn) for x in "ab"}
    tensors |= {f"m.{x}_scale_inv": torch.tensor(1.0) for x in "ab"}
    tensors["m.activation_scale"] = torch.tensor(1.0)
    assert ModelTensors(write_fp8(tmp_path / "base", tensors)).keys() == {"m.a", "m.b"}
