"""Base models are resolved, loaded in full or in NF4, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.core.weight_files import weight_files
from dtrain.methods.base import build_method
from dtrain.models.hub import base_folder
from dtrain.models.load import load_base, read_config, resolve_dtype
from dtrain.models.meta_model import build_meta_model
from dtrain.models.parameter_counts import parameter_counts
from dtrain.models.quantize import nf4_layers

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    return tmp_path / "base"


def load(folder: Path, quantized: bool = False, **settings: object) -> PreTrainedModel:
    chosen = schema.Model(base=str(folder), **settings)  # type: ignore[arg-type]
    return load_base(folder, chosen, quantized=quantized, dtype=torch.float32, device=CPU)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def logits(model: nn.Module, train: bool) -> Tensor:
    model.train(train)
    with torch.set_grad_enabled(train):
        return model(torch.arange(20)[None], use_cache=False).logits.detach()


def test_base_is_complete_frozen_and_without_cache_or_dropout(folder: Path) -> None:
    model = load(folder)
    assert torch.equal(
        logits(model, False), logits(AutoModelForCausalLM.from_pretrained(folder), False)
    )
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.use_cache is False
    assert torch.equal(logits(model, True), logits(model, True))  # its own dropout is off


def test_auto_is_bfloat16_on_a_gpu_and_float32_on_a_cpu() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_nf4_keeps_its_weights_through_evaluation(folder: Path) -> None:
    model = load(folder, quantized=True)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32  # a float storage is what FSDP2 shards
    before, bytes_before = logits(model, True), weight.data.clone()
    evaluated = logits(model, False)
    assert torch.allclose(evaluated, before, atol=1e-6)
    assert torch.equal(logits(model, True), before)
    now = model.model.layers[0].self_attn.q_proj.weight
    assert now.dtype == torch.float32 and now.shape == weight.shape
    assert torch.equal(now.data.view(torch.uint8), bytes_before.view(torch.uint8))


def test_nf4_layers_are_known_without_loading(folder: Path) -> None:
    model = load(folder, quantized=True)
    packed = {n for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert nf4_layers(build_meta_model(read_config(folder, trust_remote_code=False))) == packed
    assert len(packed) == 14 and "lm_head" not in packed


def test_nf4_does_not_change_parameter_counts(folder: Path) -> None:
    total = sum(p.numel() for p in load(folder).parameters())
    assert parameter_counts(load(folder)) == (0, total)
    assert parameter_counts(load(folder, quantized=True)) == (0, total)
    adapted = build_method(Lora(kind="qlora", r=2)).attach(load(folder, quantized=True), seed=0)
    trains, everything = parameter_counts(adapted)
    assert everything == total + trains > total
    assert all(p.dtype == torch.float32 for p in adapted.parameters() if p.requires_grad)


def test_missing_tensor_is_refused(folder: Path) -> None:
    shard = weight_files(folder)[2]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != lost}, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 tensors are missing: " + lost):
        load(folder)


def test_shape_other_than_the_configs_is_refused(folder: Path) -> None:
    edit_config(folder, vocab_size=65)
    with pytest.raises(UserError, match=r"2 tensors are of another shape: .*embed_tokens"):
        load(folder)


def test_truncated_shard_is_named(folder: Path) -> None:
    shard = weight_files(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=shard.name + ": not a whole safetensors file"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(UserError, match="no safetensors weights"):
        load(folder)


def test_index_that_leaves_its_folder_is_refused(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../outside.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"points outside its folder: '../outside.safetensors'"):
        load(folder)


@pytest.mark.parametrize(
    "content", [{"eos_token_id": [1, "2"]}, {"bos_token_id": 2**70}, {"stop_strings": {}}]
)
def test_wrong_types_in_the_generation_config_are_named(folder: Path, content: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_config(folder, trust_remote_code=False)
    assert next(iter(content)) in str(caught.value) and "generation_config.json" in str(
        caught.value
    )


def test_missing_shard_is_named(folder: Path) -> None:
    gone = weight_files(folder)[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"shard {gone.name} is missing"):
        load(folder)


def test_code_of_a_model_needs_trust_remote_code(folder: Path) -> None:
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"model.trust_remote_code: true"):
        load(folder)


def test_code_of_a_model_that_transformers_knows_does_not_run(folder: Path) -> None:
    """An old checkpoint of a known type may still name its own code."""
    edit_config(folder, auto_map={"AutoModelForCausalLM": "own.Model"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    assert type(load(folder)).__module__.startswith("transformers.models.")


def test_unknown_or_unsupported_architectures_are_refused(folder: Path) -> None:
    edit_config(folder, model_type="nothing-known")
    with pytest.raises(UserError, match="unknown model_type 'nothing-known'"):
        load(folder)
    edit_config(folder, model_type="vit")
    with pytest.raises(UserError, match="not a causal language model"):
        load(folder)


def test_quantized_base_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="already quantized"):
        load(folder)


def test_base_folder_resolves_each_kind_of_address(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    assert base_folder(str(folder)) == folder
    sample = tmp_path / "cache" / "samples" / "small"
    sample.mkdir(parents=True)
    (sample / "config.json").write_text("{}")
    assert base_folder("dtrain:small") == sample
    with pytest.raises(UserError, match="has not been built yet"):
        base_folder("dtrain:other")
    with pytest.raises(UserError, match="no folder"):
        base_folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no config.json"):
        base_folder(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        base_folder("owner/na me")


def test_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("dtrain.models.hub.snapshot_download", offline)
    with pytest.raises(UserError, match="cannot be downloaded from the hub") as caught:
        base_folder("owner/model")
    assert "HF_HOME" in str(caught.value)


def test_training_in_place_does_not_change_the_bases_files(folder: Path) -> None:
    """Loaded tensors are memory-mapped: a shared mapping would write the updates to the disk."""
    before = [path.read_bytes() for path in weight_files(folder)]
    model = build_method(Full(kind="full")).attach(load(folder), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    del model
    assert [path.read_bytes() for path in weight_files(folder)] == before
