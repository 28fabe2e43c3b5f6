"""Every method under every engine: the same losses, exact resume, the adapter in PEFT, the merge.

The methods are those of `TRAITS`, with their defaults and a small rank; a new one is tested without
a change of this file. tests/golden/methods.txt says what holds for each of them. To write it again
after a change that is meant to change it: `DTRAIN_WRITE_GOLDEN=1 pytest
tests/distributed/test_methods.py`, for all methods or `-k` one of them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config.engines import ENGINES
from dtrain.config.methods import TRAITS, MethodTraits, QuantizableSettings, parse_method
from dtrain.core.cache_paths import local_path
from dtrain.methods.base import build_method
from dtrain.samples.make import ensure

GOLDEN = Path(__file__).parents[1] / "golden" / "methods.txt"
HEAD = ["method", *ENGINES, "starts as", "in PEFT", "merged"]
WIDTHS = [16, *(9 for _ in ENGINES), 11, 9, 6]
SMALL = {"r": 4, "dropout": 0.1}  # of the keys that a method has
# Settings that change what a method does under an engine: embeddings are tied, for "lora+whole".
VARIANTS: dict[str, dict[str, Any]] = {
    "lora+whole": {"kind": "lora", "modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    | {"rank_pattern": {r"layers\.0\..*": 2}},
    "lora+from": {"kind": "lora", "dropout": 0.0, "modules_to_save": ["model.norm"]},
    # On a mixture of experts with adapters, which a term switches off in each step.
    "lora+router": {"kind": "lora", "router": "train"},
    "lora+tokens": {"kind": "lora"},  # embeddings are tied, and get more rows
    "qlora+tokens": {"kind": "qlora"},
}
TOKENS = {  # words of the data, by the case
    "lora+tokens": {"add": ["garden", "river"]},
    "qlora+tokens": {"add": {"garden": "hill", "river": "under the tree"}},
}
VARIANTS |= {
    f"{kind}+nf4": {"kind": kind, "quantize": "nf4"}
    for kind in TRAITS
    if isinstance(parse_method({"kind": kind}), QuantizableSettings)
}
CASES = [*TRAITS, *VARIANTS]
WITHOUT_SPARE_ROWS = 365  # tokens of the sample's tokenizer
ALONE = "one rank"  # under ddp, with a micro-batch of two
TOLERANCE = 1e-5  # of the loss of a step
TARGET_TOLERANCE = 5e-5  # of the loss of a target, relative to the greatest
RECIPE = """
name: methods
device: cpu
model: {{base: "{base}", dtype: float32, tokens: {tokens}}}
stages:
  - name: task
    kind: cpt
    method: {method}
    regularize: {regularize}
    data:
      sequence_length: 64
      sources: [{{path: "dtrain:tiny-text/domain.jsonl", format: text}}]
    train: {{global_batch_size: 4, steps: 4, checkpoint_every_steps: 2, learning_rate: 1.0e-2}}
output: {{folder: runs/methods, merge: {merge}}}
"""


def settings(case: str) -> dict[str, Any]:
    """The method's keys in the recipe."""
    chosen = VARIANTS.get(case, {"kind": case})
    keys = type(parse_method(chosen)).model_fields
    return {key: value for key, value in SMALL.items() if key in keys} | chosen


def traits(case: str) -> MethodTraits:
    return parse_method(settings(case)).traits


def tied_base(folder: Path, rows: int | None = None) -> Path:
    """The sample model with one matrix for embeddings and output, of all rows or the first."""
    ensure("tiny-llama")
    sample = local_path("dtrain:tiny-llama")
    shutil.copytree(sample, folder)
    config = json.loads((sample / "config.json").read_text()) | {"tie_word_embeddings": True}
    config["vocab_size"] = rows or config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        tensors = {n: t for n, t in load_file(path).items() if n != "lm_head.weight"}
        tensors |= {n: t[:rows] for n, t in tensors.items() if "embed_tokens" in n}
        save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"].pop("lm_head.weight")
        index.write_text(json.dumps(content))
    return folder


def expert_base(folder: Path) -> Path:
    """A mixture of experts with the sample model's tokenizer."""
    ensure("tiny-llama")
    sample = local_path("dtrain:tiny-llama")
    dense = json.loads((sample / "config.json").read_text())
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=dense["vocab_size"], hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for path in sample.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def trained_adapter(folder: Path, method: dict[str, Any]) -> Path:
    """An adapter of the sample model that changes its output."""
    ensure("tiny-llama")
    base = AutoModelForCausalLM.from_pretrained(local_path("dtrain:tiny-llama"))
    model = build_method(parse_method(method)).attach(base.requires_grad_(False), seed=1)
    trains = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    values = {n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in trains.items()}
    build_method(parse_method(method)).save(folder, model, values)
    return folder


@pytest.fixture
def found(case: str, tmp_path: Path, start: Any) -> dict[str, dict[str, Any]]:
    """What the ranks found, by engine, and on one rank."""
    recipe = tmp_path / "recipe.yaml"
    base = "dtrain:tiny-llama"
    if case in ("lora+whole", "lora+tokens"):
        base = str(tied_base(tmp_path / "base", WITHOUT_SPARE_ROWS if "tokens" in case else None))
    base = str(expert_base(tmp_path / "base")) if case == "lora+router" else base
    method = settings(case)
    if case == "lora+from":
        method |= {"from_adapter": str(trained_adapter(tmp_path / "old", method))}
    merge = json.dumps(not traits(case).cannot_merge)
    keys = {
        "base": base,
        "tokens": json.dumps(TOKENS.get(case)),
        "method": json.dumps(method),
        "regularize": "{kind: kl_to_base, on: all, weight: 1.0}" if "router" in case else "null",
        "merge": merge,
    }
    recipe.write_text(RECIPE.format(**keys))
    overrides = {engine: [f"engine.kind={engine}"] for engine in ENGINES}
    alone = {ALONE: ["engine.kind=ddp", "stages.task.train.micro_batch_size=2"]}
    found: dict[str, dict[str, Any]] = {}
    for ranks, runs in ((2, overrides), (1, alone)):
        request = {
            "recipe": str(recipe),
            "runs": {n: [*more, f"output.folder={tmp_path / n}"] for n, more in runs.items()},
            "found": str(tmp_path / f"found-{ranks}"),
        }
        start(ranks, "methods_worker", [json.dumps(request)])
        first, *others = (
            json.loads((tmp_path / f"found-{ranks}.{rank}").read_text()) for rank in range(ranks)
        )
        assert all(other == first for other in others), "the ranks disagree"
        found |= first
    return found


def lines_of(case: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """The method's line in the table, and one for each refusal."""
    alone, known = found[ALONE], traits(case)
    engines = ["refused" if "refused" in found[engine] else "yes" for engine in ENGINES]
    start = "other" if alone["start"] > TARGET_TOLERANCE else "base"
    start = f"NF4 {start}" if known.quantizes_base else start
    in_peft = "yes" if "peft" in alone else "no" if "not peft" in alone else "-"
    merged = "no" if known.cannot_merge else "yes"
    notes = [f"{case}, {e}: {found[e]['refused']}" for e in ENGINES if "refused" in found[e]]
    notes += [f"{case}, merged: {known.cannot_merge}"] if known.cannot_merge else []
    return [row([case, *engines, start, in_peft, merged]), *notes]


def row(cells: list[str]) -> str:
    return "".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def golden(case: str) -> list[str]:
    """The lines about a method."""
    return [
        line for line in GOLDEN.read_text().splitlines() if line.split(" ")[0].strip(",") == case
    ]


def write_golden(case: str, lines: list[str]) -> None:
    """Replace the lines about a method; the file has the order of CASES, refusals below."""
    known = {other: golden(other) for other in CASES} if GOLDEN.exists() else {}
    known |= {case: lines}
    rows = [known[other] for other in CASES if known.get(other)]
    notes = [note for _, *notes in rows for note in notes]
    GOLDEN.write_text("\n".join([row(HEAD), *(first for first, *_ in rows), *notes]) + "\n")


@pytest.mark.parametrize("case", CASES)
def test_method_under_every_engine(case, found) -> None:
    assert "refused" not in found[ALONE], found[ALONE]
    runs = {name: facts for name, facts in found.items() if "refused" not in facts}
    alone = runs[ALONE]
    assert abs(alone["learned"]) > 1e-3, "nothing was learned: this would show nothing"
    for name, facts in runs.items():
        assert facts["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE), name
        assert facts["resumes"], f"{name}: other weights or losses after a resume"
    assert not alone.get("names"), "the adapter's names are not PEFT's"
    for way in ("continues", "peft", "merged"):
        assert alone.get(way, 0) <= TARGET_TOLERANCE, way
    assert ("merged" in alone) == (not traits(case).cannot_merge)
    lines = lines_of(case, found)
    if "DTRAIN_WRITE_GOLDEN" in os.environ:
        write_golden(case, lines)
    assert lines == golden(case)
