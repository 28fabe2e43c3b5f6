"""A merged model computes what the adapter on its base does, in plain transformers and PEFT."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.diff import diff_models
from dtrain.merge.merge import MergeJob, TrainedWeights
from dtrain.merge.merge_inputs import CombineMethod, adapter_input, combined_input
from dtrain.merge.verify import verify_model
from dtrain.merge.weight_delta import REFUSED, USED, WITHOUT_EFFECT
from dtrain.models.peft_format import file_key

IDS = torch.arange(2, 42)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
BASES: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "tied llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "tied gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "tied gemma": Gemma3TextConfig(**SMALL, head_dim=8, tie_word_embeddings=True),
}
EMBED, HEAD, Q = "embed_tokens", "lm_head", "q_proj"
Lora = partial(LoraConfig, task_type="CAUSAL_LM", r=4, lora_alpha=6)
# Case → base, adapter, whether the result has a head of its own that the base did not have.
TIED = {
    "embedding saved": (Lora(target_modules=[Q], modules_to_save=[EMBED]), True),
    "head saved": (Lora(target_modules=[Q], modules_to_save=[HEAD]), True),
    "both saved": (Lora(target_modules=[Q], modules_to_save=[EMBED, HEAD]), True),
    "embedding adapted": (Lora(target_modules=[Q, EMBED]), True),
    "head adapted": (Lora(target_modules=[Q, HEAD]), True),
    "both adapted": (Lora(target_modules=[EMBED, HEAD]), True),
    "embedding adapted, dora": (Lora(target_modules=[EMBED], use_dora=True), True),
    "embedding saved, head follows": (
        Lora(target_modules=[Q], modules_to_save=[EMBED], ensure_weight_tying=True), False,
    ),
    "head saved, embedding follows": (
        Lora(target_modules=[Q], modules_to_save=[HEAD], ensure_weight_tying=True), False,
    ),
    "embedding adapted, head follows": (
        Lora(target_modules=[EMBED], ensure_weight_tying=True), False,
    ),
    "head adapted, embedding follows": (
        Lora(target_modules=[HEAD], ensure_weight_tying=True), False,
    ),
    "both adapted, scaled apart": (
        Lora(target_modules=[EMBED], alpha_pattern={HEAD: 20}, ensure_weight_tying=True), True,
    ),
    "tokens": (Lora(target_modules=[Q], trainable_token_indices=[3, 299, 7]), False),
    "tokens of the head": (Lora(target_modules=[Q], trainable_token_indices={HEAD: [3, 9]}), True),
    "tokens apart": (
        Lora(target_modules=[Q], trainable_token_indices={HEAD: [3], EMBED: [4, 5]}), True,
    ),
    "nothing of either": (Lora(target_modules="all-linear"), False),
}  # fmt: skip
OTHERS = {
    "rank and alpha patterns": (
        "llama",
        Lora(
            target_modules=[Q, "up_proj"], rank_pattern={"^model.layers.1.*up_proj": 3, Q: 9},
            alpha_pattern={"layers.0.self_attn.q_proj": 40},
        ),
    ),
    "rslora": ("llama", Lora(target_modules="all-linear", use_rslora=True)),
    "rslora with patterns": (
        "llama", Lora(target_modules=[Q], use_rslora=True, rank_pattern={"layers.1.*q_proj": 9}),
    ),
    "dora": ("llama", Lora(target_modules="all-linear", use_dora=True)),
    "dora of conv1d": (
        "tied gpt2", Lora(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
    ),
    "fan in fan out": ("tied gpt2", Lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "bias all": ("llama with biases", Lora(target_modules=[Q], bias="all")),
    "bias lora_only": ("llama with biases", Lora(target_modules=[Q], bias="lora_only")),
    "lora bias": ("llama with biases", Lora(target_modules=[Q], lora_bias=True)),
    "bias and lora bias": (
        "llama with biases", Lora(target_modules=[Q], lora_bias=True, bias="lora_only"),
    ),
    "modules to save": (
        "llama", Lora(target_modules=[Q], modules_to_save=[EMBED, HEAD, "norm", "up_proj"]),
    ),
    "exclude": ("llama", Lora(target_modules="all-linear", exclude_modules=["down_proj"])),
    "some layers": (
        "llama", Lora(target_modules=[Q], layers_to_transform=[1], layers_pattern="layers"),
    ),
    "by regex": ("llama", Lora(target_modules=r".*\.(1\.self_attn\.[qk]|0\.mlp\.up)_proj")),
    "tokens": ("llama", Lora(target_modules=[Q], trainable_token_indices={EMBED: [1], HEAD: [5]})),
    "embeddings": ("llama", Lora(target_modules=[EMBED, HEAD])),
    "gaussian": ("llama", Lora(target_modules=[Q], init_lora_weights="gaussian")),
    "orthogonal": ("llama", Lora(target_modules=[Q], init_lora_weights="orthogonal")),
    "adalora": (
        "llama",
        AdaLoraConfig(init_r=6, target_r=4, lora_alpha=13, total_step=9, target_modules=[Q]),
    ),
    "tied gpt2": ("tied gpt2", Lora(target_modules=["c_attn"], modules_to_save=["wte"])),
    "tied gemma": ("tied gemma", Lora(target_modules=[Q, EMBED])),
}  # fmt: skip


def make(folder: Path, config: Any, adapter: Any, shards: str = "5GB") -> None:
    """`folder`/base, and `folder`/adapter with random values, as PEFT writes it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base", max_shard_size=shards)
    add_adapter(folder / "base", adapter, folder / "adapter")


def add_adapter(base: Path, config: Any, folder: Path, seed: int = 1) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * 0.2
    model.save_pretrained(folder)


def merged(base: Path, out: Path, *adapters: Path) -> Path:
    job = MergeJob(base, out, source="test")
    job.merge_adapters([adapter_input(MergeableAdapter.open(a, job.tensors)) for a in adapters])
    assert not verify_model(out).problems
    return out


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    result: Tensor = model.eval()(input_ids=IDS).logits.float()
    return result


def gap(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / max(1.0, second.abs().max()))


def has_own_head(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    heads = [HEAD in name for path in folder.glob("*.safetensors") for name in load_file(path)]
    assert any(heads) == (config["tie_word_embeddings"] is False)
    return any(heads)


@pytest.mark.parametrize("case", TIED)
def test_tied_head_equals_the_adapter_on_the_base(case: str, tmp_path: Path) -> None:
    adapter, unties = TIED[case]
    make(tmp_path, BASES["tied llama"], adapter)
    out = merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    expected = logits(tmp_path / "base", tmp_path / "adapter")
    assert gap(logits(tmp_path / "base"), expected) > 1e-3
    assert gap(logits(out), expected) < 1e-5
    assert has_own_head(out) == unties


@pytest.mark.parametrize("case", OTHERS)
def test_merged_model_equals_the_adapter_on_the_base(case: str, tmp_path: Path) -> None:
    base, adapter = OTHERS[case]
    make(tmp_path, BASES[base], adapter)
    out = merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    expected = logits(tmp_path / "base", tmp_path / "adapter")
    assert gap(logits(tmp_path / "base"), expected) > 1e-3
    assert gap(logits(out), expected) < 1e-5


def test_untied_head_is_written_to_the_embedding_shard(tmp_path: Path) -> None:
    make(tmp_path, BASES["tied llama"], TIED["embedding saved"][0], shards="20KB")
    out = merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    assert gap(logits(out), logits(tmp_path / "base", tmp_path / "adapter")) < 1e-5
    old, new = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (tmp_path / "base", out)
    )
    embedding = "model.embed_tokens.weight"
    assert new["weight_map"].pop("lm_head.weight") == old["weight_map"][embedding]
    assert new["weight_map"] == old["weight_map"] and len(set(old["weight_map"].values())) > 2
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 300 * 32 * 4


def test_untied_head_equals_the_old_embedding_bit_for_bit(tmp_path: Path) -> None:
    make(tmp_path, BASES["tied llama"], TIED["embedding saved"][0])
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    out = merged(base, tmp_path / "out", tmp_path / "adapter")
    old, new = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert torch.equal(new["lm_head.weight"], old["model.embed_tokens.weight"])
    differences = diff_models(base, out)
    assert not differences.incomparable and "lm_head.weight" not in {
        c.name for c in differences.changes
    }
    assert differences.equal == len(new) - len(differences.changes)


def test_tied_pair_stored_twice_is_untied(tmp_path: Path) -> None:
    make(tmp_path, BASES["tied llama"], TIED["embedding saved"][0])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    out = merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    assert gap(logits(out), logits(tmp_path / "base", tmp_path / "adapter")) < 1e-5
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_adapter_chain_over_an_untied_model(tmp_path: Path) -> None:
    """The second adapter was trained on the untied model, or is put on with the first at once."""
    make(tmp_path, BASES["tied llama"], TIED["embedding adapted"][0])
    first = merged(tmp_path / "base", tmp_path / "first", tmp_path / "adapter")
    add_adapter(first, Lora(target_modules=[Q, EMBED, HEAD]), tmp_path / "adapter2", 2)
    expected = logits(first, tmp_path / "adapter2")
    second = merged(first, tmp_path / "second", tmp_path / "adapter2")
    at_once = merged(
        tmp_path / "base", tmp_path / "both", tmp_path / "adapter", tmp_path / "adapter2"
    )
    assert gap(logits(second), expected) < 1e-5
    assert gap(logits(at_once), expected) < 1e-5


def test_combined_adapters_untie_the_head(tmp_path: Path) -> None:
    """Linear, as PEFT's add_weighted_adapter combines them: A and B apart."""
    make(tmp_path, BASES["tied llama"], Lora(target_modules=[Q, HEAD]))
    base, folders = tmp_path / "base", [tmp_path / "adapter", tmp_path / "second"]
    add_adapter(base, Lora(target_modules=[Q, HEAD]), folders[1], 2)
    for folder in folders:  # without the base weights that PEFT saves with an adapted head
        file = folder / "adapter_model.safetensors"
        save_file({k: t for k, t in load_file(file).items() if "base_layer" not in k}, file)
    job = MergeJob(base, tmp_path / "out", source="test")
    opened = [MergeableAdapter.open(folder, job.tensors) for folder in folders]
    job.merge_adapters([combined_input(opened, [0.7, 0.4], CombineMethod("linear", 1.0))])
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folders[0], "one"
    )
    model.load_adapter(folders[1], "two")
    model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "both", "linear")
    model.set_adapter("both")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    assert gap(logits(tmp_path / "out"), expected) < 1e-5 < gap(logits(base), expected)


@pytest.mark.parametrize("stored", ["once", "twice"])
def test_full_training_of_a_tied_model_keeps_one_matrix(stored: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(BASES["tied llama"])
    base, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(base)
    if stored == "twice":
        tensors = load_file(base / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    new = {name: parameter.detach() * 1.5 for name, parameter in model.named_parameters()}
    shapes = {name: list(tensor.shape) for name, tensor in new.items()}
    assert "lm_head.weight" not in shapes
    trained = TrainedWeights(shapes, lambda name, a, b: new[name].flatten()[a:b], "c")
    MergeJob(base, out, source="t").replace_weights(trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(new[name])
        expected = model(input_ids=IDS).logits
    assert gap(logits(out), expected) < 1e-5
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    again = load_file(out / "model.safetensors")
    assert ("lm_head.weight" in again) == (stored == "twice")


def test_tied_tensors_of_a_model_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    make(tmp_path, BASES["tied llama"], TIED["embedding saved"][0])
    path = tmp_path / "base" / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"nobody_knows_it"'))
    with pytest.raises(UserError, match="embedding and output head are tied, but which"):
        merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["default", "task-1"])
@pytest.mark.parametrize("case", ["embeddings", "dora", "modules to save", "adalora", "tokens"])
def test_adapter_name_in_its_keys_is_read(case: str, name: str, tmp_path: Path) -> None:
    base, adapter = OTHERS[case]
    make(tmp_path, BASES[base], adapter)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(model, tmp_path / "adapter", name)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    in_memory = {key: t for key, t in model.state_dict().items() if file_key(key) in stored}
    assert {file_key(key) for key in in_memory} == stored.keys()
    assert any(f".{name}" in key for key in in_memory)
    shutil.copytree(tmp_path / "adapter", tmp_path / "named")
    tensors = {key: tensor.contiguous() for key, tensor in in_memory.items()}
    save_file(tensors, tmp_path / "named" / file.name)
    plain = merged(tmp_path / "base", tmp_path / "plain", tmp_path / "adapter")
    out = merged(tmp_path / "base", tmp_path / "out", tmp_path / "named")
    first, second = (load_file(folder / "model.safetensors") for folder in (plain, out))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_a_file_of_two_adapters_is_refused(tmp_path: Path) -> None:
    make(tmp_path, BASES["llama"], Lora(target_modules=[Q]))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    named = {key.replace(".weight", ".other.weight"): t.clone() for key, t in stored.items()}
    save_file(stored | named, file)
    with pytest.raises(UserError, match="contains two adapters"):
        merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")


def test_every_peft_config_field_is_classified() -> None:
    kinds = (LoraConfig, AdaLoraConfig, IA3Config, VeraConfig)
    fields = {f.name for kind in kinds for f in dataclasses.fields(kind)}
    assert fields == USED | WITHOUT_EFFECT | REFUSED.keys()
    assert not (USED & WITHOUT_EFFECT or (USED | WITHOUT_EFFECT) & REFUSED.keys())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, {"some": 1}) for field in REFUSED), ("of_a_later_peft", True),
        *(("init_lora_weights", v) for v in ("pissa_niter_4", "olora", "loftq", "corda", "lora_ga",
                                             "mica", "of_a_later_peft")),
    ],
)  # fmt: skip
def test_unsupported_peft_computation_is_refused(field: str, value: object, tmp_path: Path) -> None:
    make(tmp_path, BASES["llama"], Lora(target_modules=[Q]))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=field):
        merged(tmp_path / "base", tmp_path / "out", tmp_path / "adapter")
