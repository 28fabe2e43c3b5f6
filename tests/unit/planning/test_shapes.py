"""Parameter counts from config.json, compared with models built by transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config.load import load_recipe
from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.planning.architectures import read_config, shape_of
from dtrain.planning.build_workload import build_workload
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import KNOWN, find_config, find_shape
from dtrain.planning.shapes import ModelShape, select_linears
from dtrain.planning.workload import Cluster, Workload

GQA = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
SMALL = GQA | {"intermediate_size": 96, "num_hidden_layers": 2}
ODD = {
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True} | SMALL,
    "llama, no kv heads": {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    | {"vocab_size": 99, "intermediate_size": 96, "num_hidden_layers": 2},
    "qwen3, defaults": {"model_type": "qwen3", "attention_bias": True} | SMALL,
    "gemma, defaults": {"model_type": "gemma"} | SMALL,
    "gemma2, defaults": {"model_type": "gemma2"} | SMALL,
    "gemma3": {"model_type": "gemma3_text", "head_dim": 32, "attention_bias": True} | SMALL,
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0} | SMALL,
    "granite, tied": {"model_type": "granite", "tie_word_embeddings": True} | SMALL,
    "phi3, head size": {"model_type": "phi3", "pad_token_id": 0} | SMALL,
}
# One of every architecture and of the sizes that recipes use.
NAMED = [
    "meta-llama/Llama-2-7b",
    "meta-llama/Llama-2-13b",
    "meta-llama/Llama-2-70b",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen2.5-32B",
    "Qwen/Qwen2.5-72B",
    "Qwen/Qwen3-8B",
    "mistralai/Mistral-7B-v0.3",
    "google/gemma-7b",
    "google/gemma-2-9b",
    "microsoft/Phi-3-mini-4k",
    "HuggingFaceTB/SmolLM2-135M",
]
CONFIGS = {n: {k: v for k, v in KNOWN[n]._asdict().items() if v is not None} for n in NAMED} | ODD


def adapter_parameters(shape: ModelShape, rank: int, target_modules, **more) -> int:
    return Workload(
        shape=shape,
        method=Lora(kind="lora", r=rank, target_modules=target_modules, **more),
        engine="ddp",
        ranks=1,
        node_ranks=1,
        shard=1,
        element_bytes=2,
        sequence_length=1,
        micro_batch=1,
        accumulation=1,
        checkpointing=False,
    ).trainable


def build_model(config):
    with torch.device("meta"):
        kind = AutoConfig.for_model(**config)
        return AutoModelForCausalLM.from_config(kind)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_counts_match_the_model(name: str) -> None:
    shape, model = shape_of(CONFIGS[name], name), build_model(CONFIGS[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert adapter_parameters(shape, 16, "all-linear") == trains(model, "all-linear", 16)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_counts_match_for_every_choice_of_targets(name: str) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 2}
    shape = shape_of(config, name)
    names = sorted({x.name.rpartition(".")[2] for x in shape.linears})
    for chosen in (*([name] for name in names), names[:2], names[1:]):
        assert adapter_parameters(shape, 8, chosen) == trains(build_model(config), chosen, 8), (
            chosen
        )


def trains(model, targets, rank: int) -> int:
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_output_matrix_can_be_a_target() -> None:
    shape = shape_of(CONFIGS["meta-llama/Llama-2-7b"], "here")
    model, chosen = build_model(CONFIGS["meta-llama/Llama-2-7b"]), ["self_attn.q_proj", "lm_head"]
    assert adapter_parameters(shape, 4, chosen) == trains(model, chosen, 4)


def test_ranks_by_pattern_are_counted_as_peft_adds_them() -> None:
    shape = shape_of(CONFIGS["HuggingFaceTB/SmolLM2-135M"], "here")
    patterns = {r"layers\.1.\..*": 3, "q_proj": 9}
    config = LoraConfig(r=4, target_modules="all-linear", rank_pattern=patterns)
    model = get_peft_model(build_model(CONFIGS["HuggingFaceTB/SmolLM2-135M"]), config)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(shape, 4, "all-linear", rank_pattern=patterns) == expected


WHOLE = ["embed_tokens", "lm_head", "norm", "up_proj"]


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c["model_type"] != "phi3"])
def test_modules_that_train_whole_are_counted_as_peft_copies_them(name: str) -> None:
    config = CONFIGS[name] | {"num_hidden_layers": 2}
    shape, model = shape_of(config, name), build_model(config)
    ends = [end for end in WHOLE if end != "lm_head" or not shape.tied]
    settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=ends)
    adapted = get_peft_model(model, settings)
    expected = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert adapter_parameters(shape, 4, ["q_proj"], modules_to_save=ends) == expected
    tied = adapter_parameters(shape, 4, ["q_proj"], modules_to_save=WHOLE)
    assert tied == expected, "tied matrices train as one"


def test_counts_match_known_models() -> None:
    shape, _ = find_shape("meta-llama/Llama-2-7b-hf")
    assert shape.parameters == 6_738_415_616
    assert adapter_parameters(shape, 16, "all-linear") == 39_976_960
    assert find_shape("meta-llama/Llama-3.1-70B-Instruct")[0].parameters == 70_553_706_496


def test_a_base_in_the_hub_cache_is_found(tmp_path, monkeypatch) -> None:
    repository = tmp_path / "models--me--mine"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"} | SMALL))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shape, where = find_shape("me/mine")
    assert shape.hidden == 64 and "abc" in where


LLAMA = {"model_type": "llama"} | SMALL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a model's config"),
        ('{"model_type": "llamma"}', "did you mean llama"),
        ('{"model_type": "mixtral", "num_local_experts": 8}', "intermediate_size is missing"),
        (
            '{"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4}}',
            "does not know model_type",
        ),
        ('{"model_type": "doge", "is_moe": false, "num_experts": 9}', "does not know model_type"),
        (
            '{"model_type": "gemma4", "text_config": {"num_experts": null}}',
            "does not know model_ty",
        ),
        (
            '{"model_type": "deepseek_v3", "n_routed_experts": 256, "n_shared_experts": 2, '
            '"first_k_dense_replace": 4, "num_hidden_layers": 4}',
            "does not know model_type",
        ),
        ('{"model_type": "llama"}', "hidden_size is missing"),
        (
            json.dumps({"model_type": "llama"} | SMALL | {"vocab_size": "many"}),
            "not a whole number",
        ),
        (json.dumps(LLAMA | {"vocab_size": 0}), "vocab_size is not a whole number above 0: 0"),
        (json.dumps(LLAMA | {"num_hidden_layers": 0}), "num_hidden_layers is not a whole number"),
        (json.dumps(LLAMA | {"hidden_size": 7}).replace("7", "1e400"), "hidden_size is not a"),
    ],
)
def test_an_unusable_config_is_reported(tmp_path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        shape_of(*find_config(str(tmp_path)))


def test_missing_bases_and_targets_are_reported(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        shape_of(*find_config(str(tmp_path)))
    with pytest.raises(UserError, match=r"did you mean Qwen/Qwen2\.5-7B"):
        find_shape("Qwen/Qwen2.5-7C")
    with pytest.raises(UserError, match="no linear layer is named 'q_prj'"):
        select_linears(find_shape("Qwen/Qwen2.5-7B")[0], ["q_prj"])


@pytest.mark.parametrize(
    ("base", "method", "rows"),
    [
        ("meta-llama/Llama-3.1-8B", {}, 6),
        ("meta-llama/Llama-3.2-1B", {}, 3),  # tied
        ("meta-llama/Llama-3.1-8B", {"modules_to_save": ["embed_tokens", "lm_head"]}, 0),
    ],
)
def test_rows_of_new_tokens_train(base: str, method: dict, rows: int) -> None:
    shape, _ = find_shape(base)

    def trainable(*more: str) -> int:
        text = json.dumps({"kind": "lora", **method})
        recipe = load_recipe(
            "7b-lora", [f"model.base={base}", f"stages.domain.method={text}", *more]
        )
        cluster = Cluster(find_gpu("h100-80g"), 1, 1)
        return build_workload(recipe, recipe.stages[0], shape, cluster).trainable

    assert trainable("model.tokens.add=[<a>, <b>, <c>]") - trainable() == rows * shape.hidden


@pytest.mark.parametrize(
    ("key", "is_count"),
    [
        ("num_hidden_layers", True),
        ("num_kv_shared_layers", True),
        ("n_layer", True),
        ("decoder_layers", True),
        ("intermediate_size_per_layer", False),
        ("vision_feature_layer", False),
    ],
)
def test_only_numbers_of_layers_are_limited_as_such(
    tmp_path: Path, key: str, is_count: bool
) -> None:
    path, config = tmp_path / "config.json", {"model_type": "gpt2", "text_config": {key: 4096}}
    path.write_text(json.dumps(config))
    if is_count:
        with pytest.raises(UserError, match=f"{key} is not below 2,000"):
            read_config(path)
    else:
        assert read_config(path) == config
