"""A base that cannot load is not merged into; one that lacks a tower is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.verify import verify_model
from tests.unit.models.mixtures import EXPERTS, MODELS, OTHERS, write_mixture

FILE = "model.safetensors"
EXPERT_PARAMETERS = {"gate_up_proj": (32, 32), "down_proj": (32, 16)}  # of qwen3_moe: out, in


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def drop(*words: str) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if any(word in n for word in words)]:
            del tensors[name]

    return change


def write_expert_adapter(folder: Path, layers: int, **config: Any) -> Path:
    """An adapter on all experts of some layers of a qwen3_moe."""
    tensors = {}
    for layer in range(layers):
        module = f"base_model.model.model.layers.{layer}.mlp.experts"
        for (out, into), inner in zip(EXPERT_PARAMETERS.values(), (".base_layer", ""), strict=True):
            tensors[f"{module}{inner}.lora_A.weight"] = torch.ones(2 * EXPERTS, into)
            tensors[f"{module}{inner}.lora_B.weight"] = torch.ones(out, 2 * EXPERTS)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [f"experts.{name}" for name in EXPERT_PARAMETERS]
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": targets}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return folder


def merge(base: Path, adapter: Path) -> Path:
    job = MergeJob(base, base.parent / "out", source="a base")
    job.merge_adapters([adapter_input(MergeableAdapter.open(adapter, job.tensors))])
    return job.output


@pytest.mark.parametrize("kind", [*MODELS, *OTHERS])
def test_a_whole_mixture_is_complete(kind: str, tmp_path: Path) -> None:
    BaseTensors(write_mixture(tmp_path, kind)).check_complete()


@pytest.mark.parametrize(
    "lost, config, problem",
    [
        (
            ("layers.1.mlp.gate.",),
            {},
            r"1 tensors are missing: model\.layers\.1\.mlp\.gate\.weight",
        ),
        (("experts.3.",), {}, r"down_proj has 3 experts in the files, but 4 by config\.json"),
        (("nothing",), {"num_local_experts": 8}, r"2 tensors are of another shape: .*mlp\.gate"),
        (("nothing",), {"moe_intermediate_size": 24}, r"down_proj \[4, 32, 16\], but it is"),
        (("nothing",), {"num_hidden_layers": 3}, r"are missing: model\.layers\.2\."),
    ],
)
def test_a_base_that_could_not_load_is_refused(
    lost: tuple[str, ...], config: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    base = write_mixture(tmp_path, "qwen3_moe")
    adapter = write_expert_adapter(tmp_path / "adapter", 2)
    change_tensors(base, drop(*lost))
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(UserError, match=problem):
        BaseTensors(base).check_complete()
    with pytest.raises(UserError):
        merge(base, adapter)
    assert not (tmp_path / "out").exists()
    (found,) = verify_model(base).problems
    assert re.search(problem, found)


def test_an_adapter_that_lacks_experts_is_refused(tmp_path: Path) -> None:
    base = write_mixture(tmp_path, "qwen3_moe")
    assert verify_model(merge(base, write_expert_adapter(tmp_path / "whole", 2))).problems == []
    tensors = BaseTensors(base)
    half = write_expert_adapter(tmp_path / "half", 1)
    with pytest.raises(UserError, match=r"names model\.layers\.1\.mlp\.experts\.\w+, of which"):
        MergeableAdapter.open(half, tensors)
    unnamed = write_expert_adapter(tmp_path / "unnamed", 2, target_parameters=None)
    with pytest.raises(UserError, match=r"names no target_parameters"):
        MergeableAdapter.open(unnamed, tensors)
    dora = write_expert_adapter(tmp_path / "dora", 2, use_dora=True)
    with pytest.raises(UserError, match=r"experts has no magnitude, .* says use_dora: true"):
        MergeableAdapter.open(dora, tensors)


def test_a_base_without_its_image_tower_or_processor_is_reported(
    tmp_path: Path, save_small: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    save_small("gemma3", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    BaseTensors(tmp_path).check_complete()
    assert capsys.readouterr().out == ""
    change_tensors(tmp_path, drop("vision"))
    BaseTensors(tmp_path).check_complete()
    output = " ".join(capsys.readouterr().out.split())
    assert "outside the language model are missing, such as model.vision_tower" in output
    (tmp_path / "preprocessor_config.json").unlink()
    BaseTensors(tmp_path).check_complete()
    assert "no processor_config.json or" in capsys.readouterr().out


def test_a_base_without_a_head_is_reported_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models of embeddings have none in their files, and adapters of them are merged."""
    base = write_mixture(tmp_path, "qwen3_moe")
    change_tensors(base, drop("lm_head"))
    BaseTensors(base).check_complete()
    assert "has no output head (lm_head.weight)" in " ".join(capsys.readouterr().out.split())


def test_an_odd_image_tower_is_reported_not_refused(
    tmp_path: Path, save_small: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training does not load it, so the merge after it must not fail for it."""
    save_small("gemma3", tmp_path)

    def flatten(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in sorted(tensors) if "vision" in n and tensors[n].dim() > 1)
        tensors[name] = tensors[name].flatten()

    change_tensors(tmp_path, flatten)
    BaseTensors(tmp_path).check_complete()
    output = " ".join(capsys.readouterr().out.split())
    assert "outside the language model, 1 tensors are of another shape: " in output


def test_odd_experts_outside_the_language_model_are_reported_not_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_mixture(tmp_path, "qwen3_moe")
    odd = "model.layers.1.mlp.experts.3.up_proj.weight"
    change_tensors(base, lambda tensors: tensors.update({odd: torch.ones(4, 32)}))
    tensors = BaseTensors(base)
    tensors.__dict__["_decoder"] = "model.layers.0."  # as if the other layer were of a tower
    tensors.check_complete()
    output = " ".join(capsys.readouterr().out.split())
    assert f"outside the language model, {odd} is [4, 32] in the files" in output


@pytest.mark.parametrize("change", [drop("mlp.gate."), drop("layers.1.self_attn"), drop("lm_head")])
def test_a_base_with_code_of_its_own_is_reported_not_refused(
    change: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files may hold what that code reads, instead of what transformers' class does."""
    base = write_mixture(tmp_path, "qwen3_moe")
    change_tensors(base, change)
    path = base / "config.json"
    own_code = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own_code))
    merge(base, write_expert_adapter(tmp_path / "adapter", 2))
    output = " ".join(capsys.readouterr().out.split())
    assert re.search("own code may read it|no output head", output)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_a_base_in_another_format_is_verified_for_its_values(method: str, tmp_path: Path) -> None:
    base = write_mixture(tmp_path, "qwen3_moe")

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "self_attn" in n and n.endswith("proj.weight")]:
            codes = tensors.pop(name).view(torch.uint8).view(-1, 1)
            tensors[name if method == "bitsandbytes" else f"{name[:-7]}.qweight"] = codes

    change_tensors(base, quantize)
    path = base / "config.json"
    assert verify_model(base).problems
    settings = {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert verify_model(base).problems == []
