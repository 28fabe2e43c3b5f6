"""A mistake in a later stage is reported by `check`, `submit` and `run` before a stage trains."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dtrain.config.load import load_recipe
from dtrain.core.check_report import CheckReport
from dtrain.pipeline.input_checks import check_inputs
from dtrain.planning.known_models import KNOWN

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32,
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": [8, 8], "self_attn.k_proj": [4, 8], "self_attn.v_proj": [4, 8],
    "self_attn.o_proj": [8, 8], "mlp.gate_proj": [16, 8], "mlp.up_proj": [16, 8],
    "mlp.down_proj": [8, 16], "input_layernorm": [8], "post_attention_layernorm": [8],
}  # fmt: skip
CLOSING = "{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
RATED = {"prompt": "a", "completion": "b", "label": True}


def write_model(folder: Path, **config: Any) -> Path:
    """A Llama of two layers in two files, with what `check` reads of a tokenizer."""
    shapes = {f"model.layers.{n}.{name}.weight": s for n in (0, 1) for name, s in LAYER.items()}
    shapes |= {"model.embed_tokens.weight": [32, 8], "model.norm.weight": [8]}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [32, 8]
    folder.mkdir()
    index = {}
    for number, part in enumerate((list(shapes)[:9], list(shapes)[9:])):
        file = f"model-{number}.safetensors"
        save_file({name: torch.zeros(shapes[name]) for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    write(folder / "model.safetensors.index.json", {"weight_map": index})
    write(folder / "config.json", CONFIG | config)
    write(folder / "tokenizer_config.json", {"chat_template": CLOSING, "eos_token": "</s>"})
    write(folder / "tokenizer.json", {})
    return folder


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CheckReport]:
    """inspect(overrides…) → what is found in a chain of two stages on a model in this folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_model(tmp_path / "base")
    write_model(tmp_path / "tied", tie_word_embeddings=True)
    write(tmp_path / "text.jsonl", {"text": "a"})
    write(tmp_path / "chat.jsonl", CHAT)
    train = {"global_batch_size": 1, "steps": 1}
    recipe = {
        "name": "x", "model": {"base": "base"}, "output": {"folder": "runs/x"},
        "stages": [
            {"name": "domain", "kind": "cpt", "method": {"kind": "lora"}, "train": train,
             "data": {"sources": [{"path": "text.jsonl"}]}},
            {"name": "task", "kind": "sft", "method": {"kind": "lora"}, "train": train,
             "data": {"sources": [{"path": "chat.jsonl"}]}},
        ],
    }  # fmt: skip
    write(tmp_path / "recipe.yaml", recipe)
    return lambda *overrides: check_inputs(load_recipe("recipe.yaml", overrides))


def task(**settings: Any) -> list[str]:
    """Overrides of the second stage."""
    keys = {f"stages.task.{key.replace('__', '.')}": value for key, value in settings.items()}
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]


def source(path: str, **settings: Any) -> list[str]:
    return task(data__sources=[{"path": path, **settings}])


def full(**settings: Any) -> list[str]:
    return task(method={"kind": "full", **settings})


def adapter(**settings: Any) -> list[str]:
    return task(method={"kind": "lora", **settings})


EMPTY: list[Any] = []
FAULTS: dict[str, tuple[list[str], str]] = {
    "no file": (source("chta.jsonl"), r"stages\.task\.data: chta\.jsonl: no such file"),
    "no match": (source("*.josnl"), r"stages\.task\.data: \*\.josnl: no readable files"),
    "nothing readable": (source("base/sub"), r"base/sub: no readable files"),
    "no rows": (source("empty.jsonl"), "empty.jsonl: the source has no rows"),
    "no columns": (source("chat.jsonl", columns={"messages": "talk"}), "no known format"),
    "columns": (source("text.jsonl", format="alpaca"), "column `instruction` is missing"),
    "format": (source("text.jsonl"), "sft cannot train on text rows"),
    "prose": (source("a.md", format="messages"), "plain text, not rows of messages"),
    "replay": (task(data__replay={"path": "no.jsonl"}), r"no\.jsonl: no such file"),
    "labels": (
        [*task(kind="kto"), *source("rated.jsonl")], r"stages\.task\.data: all 1 answers are label"
    ),
    "sample": (source("dtrain:tiny-txt/a.jsonl"), "did you mean tiny-text"),
    "no template": (task(data__template="no.jinja"), r"stages\.task\.data\.template: no\.jinja"),
    "bad template": (task(data__template="bad.jinja"), r"template: bad\.jinja:1: not a jinja"),
    "own template": (["model.base=plain"], r"stages\.task\.data\.template: auto: the tokenizer h"),
    "target": (adapter(target_modules=["q_prj"]), r"stages\.task\.method\.target_modules: no lin"),
    "rank": (adapter(rank_pattern={"q_prj": 4}), r"stages\.task\.method\.rank_pattern: no layer"),
    "alpha": (adapter(alpha_pattern={"layers.9.q_proj": 4}), r"task\.method\.alpha_pattern: no la"),
    "whole": (adapter(modules_to_save=["embed"]), r"task\.method\.modules_to_save: no module is"),
    "tied": (
        ["model.base=tied", *adapter(modules_to_save=["embed_tokens"])], "are one matrix"
    ),
    "twice": (
        adapter(target_modules=["q_proj"], modules_to_save=["q_proj"]), "cannot have an adapter and"
    ),
    "rate": (
        [*task(train__learning_rate_scales={"lora_C": 2.0})], r"task\.train\.learning_rate_scales"
    ),
    "rate of full": (
        [*full(), *task(train__learning_rate_scales={"hed": 2.0})], r"'hed' has no effect"
    ),
    "frozen": (full(frozen_modules=["embed_tokns"]), r"stages\.task\.method\.frozen_modules: 'em"),
    "all frozen": (full(frozen_modules=["model", "lm_head"]), "every parameter is frozen"),
    "layers": (full(trainable_layers=3), r"task\.method\.trainable_layers: the model has 2 decod"),
    "no adapter": (adapter(from_adapter="none"), r"stages\.task\.method\.from_adapter: there is n"),
    "half adapter": (adapter(from_adapter="half"), "no adapter_model.safetensors in it"),
    "other adapter": (adapter(from_adapter="other", r=16), "r: 4 in the adapter, 16 here"),
    "teacher": (
        task(kind="distill", distill={"teacher": "./none"}), r"stages\.task\.distill\.teacher: the"
    ),
    "held-out": (
        ['evaluation.sets={"h": {"kind": "sft", "sources": [{"path": "no.jsonl"}]}}'],
        r"evaluation\.sets\.h: no\.jsonl: no such file",
    ),
    "prompts": (
        ['evaluation.generation={"p": {"path": "no.jsonl"}}'], r"generation\.p\.path: no\.jsonl: n"
    ),
    "prompt rows": (
        ['evaluation.generation={"p": {"path": "text.jsonl"}}'], "a row of text has no prompt"
    ),
    "reference": (
        ['evaluation.generation={"p": {"path": "asked.jsonl", "metrics": ["f1"]}}'],
        r"asked\.jsonl:1: the row has no reference answer, which f1 compares with",
    ),
    "reuse": (["output.reuse=runs/old"], r"output\.reuse: .*old: is not a run folder"),
    "base": (["model.base=./bse"], r"model\.base: there is no folder bse"),
    "quantized": (["model.base=gptq"], r"gptq/config\.json: the base is .* quantized \(gptq\)"),
    "fp8 weights": (["model.base=f8"], r"proj\.weight is stored as F8_E4M3, so .* is quantized"),
    "shard": (["model.base=shard"], r"shard model-1\.safetensors is missing"),
    "cut shard": (["model.base=cut"], r"cut/model-1\.safetensors: not a whole safetensors file"),
    "fewer layers": (["model.base=deeper"], r"deeper/config\.json: describes .* \(3 layers"),
    "more layers": (["model.base=flat"], r"num_hidden_layers is 1, but the files have 2 layers"),
    "routers": (adapter(router="train"), r"task\.method\.router: this model has no routers"),
    "lost tensor": (
        ["model.base=lost"], r"index\.json: model\.layers\.\S+ is in no file of the model"
    ),
    "no weights": (["model.base=weightless"], "no safetensors weights"),
    "tokenizer": (["model.base=mute"], "no tokenizer in it"),
}  # fmt: skip


def write_faulty_inputs(folder: Path) -> None:
    """The broken files that FAULTS name."""
    write(folder / "empty.jsonl")
    write(folder / "rated.jsonl", RATED)
    write(folder / "asked.jsonl", {"prompt": "a"})
    (folder / "a.md").write_text("a text")
    (folder / "bad.jinja").write_text("{% for m in messages %}{{ broken")
    (folder / "base" / "sub").mkdir()
    (write_model(folder / "plain") / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    write_model(folder / "gptq", quantization_config={"quant_method": "gptq"})
    codes = {"model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8, dtype=torch.float8_e4m3fn)}
    save_file(codes, write_model(folder / "f8") / "model-0.safetensors")
    (write_model(folder / "shard") / "model-1.safetensors").unlink()
    write_model(folder / "deeper", num_hidden_layers=3)
    write_model(folder / "flat", num_hidden_layers=1)
    save_file({"a": torch.zeros(1)}, write_model(folder / "lost") / "model-1.safetensors")
    cut = write_model(folder / "cut") / "model-1.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    for path in write_model(folder / "weightless").glob("model*"):
        path.unlink()
    for path in write_model(folder / "mute").glob("tokenizer*"):
        path.unlink()
    for name in ("half", "other"):
        (folder / name).mkdir()
        write(folder / name / "adapter_config.json", {"peft_type": "LORA", "r": 4})
    save_file({"a": torch.zeros(1)}, folder / "other" / "adapter_model.safetensors")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_later_stage_is_named(
    fault: str, inspect: Callable[..., CheckReport], tmp_path: Path
) -> None:
    write_faulty_inputs(tmp_path)
    overrides, message = FAULTS[fault]
    report = inspect(*overrides)
    with pytest.raises(Exception, match=message):
        report.raise_errors()


def test_a_right_chain_passes(inspect: Callable[..., CheckReport]) -> None:
    report = inspect(
        *adapter(rank_pattern={"layers.1.*q_proj": 4}, modules_to_save=["norm", "lm_head"]),
        *task(train__learning_rate_scales={"lora_B": 4.0, "lm_head": 0.1}),
        'evaluation.sets={"h": {"kind": "cpt", "sources": [{"path": "text.jsonl"}]}}',
        'evaluation.generation={"p": {"path": "chat.jsonl", "metrics": ["f1"]}}',
    )
    assert not report.errors and not report.notes
    assert not inspect(*full(frozen_modules=["embed_tokens"], trainable_layers=None)).errors
    assert not inspect(
        "model.base=tied", *adapter(modules_to_save=["embed_tokens", "lm_head"])
    ).errors


def test_all_faults_are_reported_at_once(inspect: Callable[..., CheckReport]) -> None:
    report = inspect(*source("no.jsonl"), *adapter(target_modules=["q"]), "model.base=nowhere/x/y")
    assert len(report.errors) == 2  # without a base, the names of its layers are unknown
    assert not any("names of layers" in note or "template" in note for note in report.notes)


def test_names_that_cannot_be_checked_without_the_base_are_noted(
    inspect: Callable[..., CheckReport],
) -> None:
    report = inspect("model.base=nowhere/x", *adapter(target_modules=["q"]))
    assert not report.errors and any("names of layers" in note for note in report.notes)


MIXTURE = "model.base=Qwen/Qwen3-30B-A3B"
FAULTS_OF_EXPERTS: dict[str, tuple[list[str], str]] = {
    "name": (adapter(target_modules=["q_projj"]), "no linear layer is named 'q_projj'"),
    "router": (adapter(target_modules=["gate"]), "mlp.gate is a router, which gets no adapter"),
    "router's path": (adapter(target_modules=["mlp.gate"]), "mlp.gate is a router, which gets no"),
    "rank": (adapter(rank_pattern={"nope": 3}), "rank_pattern: no layer .* named 'nope'"),
    "whole experts": (adapter(modules_to_save=["gate_up_proj"]), "no module is named 'gate_up_pr"),
    "whole router": (adapter(modules_to_save=["gate"]), "mlp.gate is a router, which trains with"),
    "no experts": (adapter(experts=False, target_modules=["down_proj"]), "names weights of expe"),
    "ia3": (task(method={"kind": "ia3"}), "'down_proj' names weights of experts, which get no ad"),
    "frozen": (full(frozen_modules=["exprts"]), "frozen_modules: 'exprts' has no effect"),
    "frozen router": (full(frozen_modules=["gate"], router="train"), "would train and stay frozen"),
    "rate": (
        [*full(), *task(train__learning_rate_scales={"gate": 2.0})], "'gate' has no effect"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS_OF_EXPERTS)
def test_faults_are_found_in_a_mixture_of_experts(
    fault: str, inspect: Callable[..., CheckReport]
) -> None:
    overrides, message = FAULTS_OF_EXPERTS[fault]
    (error,) = inspect(MIXTURE, *overrides).errors
    assert re.search(rf"^stages\.task\..*{message}", str(error))


def test_a_right_recipe_of_a_mixture_of_experts_passes(
    inspect: Callable[..., CheckReport],
) -> None:
    targets = ["q_proj", "gate_up_proj", "experts.down_proj"]
    rates = {"lora_B": 4.0, "gate": 0.1}
    right = [
        adapter(target_modules=targets, rank_pattern={"gate_up_proj": 4}, router="train"),
        [*adapter(router="train"), *task(train__learning_rate_scales=rates)],
        full(frozen_modules=["gate", "experts"]),
        adapter(experts=False, modules_to_save=["norm"]),
    ]
    for overrides in right:
        report = inspect(MIXTURE, *overrides)
        assert not report.errors and not any("layers" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["dora", "vera"])
def test_experts_that_a_method_does_not_adapt_are_noted(
    kind: str, inspect: Callable[..., CheckReport]
) -> None:
    note = f"warning: stages.task.method: {kind} has no adapters for experts"
    chosen = task(method={"kind": kind})
    assert any(text.startswith(note) for text in inspect(MIXTURE, *chosen).notes)
    assert not inspect(*chosen).notes
    chosen = task(method={"kind": kind, "target_modules": ["q_proj"]})
    assert not any("experts" in text for text in inspect(MIXTURE, *chosen).notes)


def test_names_are_checked_by_the_table_of_sizes(inspect: Callable[..., CheckReport]) -> None:
    assert "Qwen/Qwen2.5-7B" in KNOWN
    report = inspect("model.base=Qwen/Qwen2.5-7B", *adapter(target_modules=["q_prj"]))
    assert "no linear layer is named 'q_prj'" in str(report.errors[0])
    assert any("`dtrain model fetch Qwen/Qwen2.5-7B` downloads it" in n for n in report.notes)


def test_names_of_an_unknown_architecture_are_noted(
    inspect: Callable[..., CheckReport], tmp_path: Path
) -> None:
    write_model(tmp_path / "odd", model_type="olmo2")
    report = inspect("model.base=odd", *adapter(target_modules=["q_proj", "q_prj"]))
    (note,) = report.notes
    assert not report.errors and "stages.task.method.target_modules" in note and "'q_prj'" in note


def test_a_token_that_the_base_has_is_reported(
    inspect: Callable[..., CheckReport], tmp_path: Path
) -> None:
    tokenizer = {"model": {"vocab": {"<a>": 3}}, "added_tokens": [{"content": "<b>", "id": 9}]}
    write(tmp_path / "base" / "tokenizer.json", tokenizer)
    assert not inspect('model.tokens.add=["<c>"]').errors
    (error,) = inspect('model.tokens.add=["<c>", "<b>"]').errors
    assert str(error).startswith("model.tokens.add: the base has the token '<b>' already, number 9")
