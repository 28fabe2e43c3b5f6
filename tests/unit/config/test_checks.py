"""Keys that clash are both named, with a fix."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.checks import accumulation, check
from dtrain.config.methods import TRAITS, Lora
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError

HELD_OUT = {"kind": "cpt", "sources": [{"path": "h.txt", "format": "text"}]}
BASE: dict[str, Any] = {
    "name": "x",
    "model": {"base": "b"},
    "stages": [
        {
            "name": "domain",
            "kind": "cpt",
            "method": {"kind": "lora"},
            "data": {"sources": [{"path": "a.txt", "format": "text"}]},
            "train": {"global_batch_size": 8, "steps": 10},
        }
    ],
    "evaluation": {"sets": {"domain": HELD_OUT}},
    "output": {"folder": "runs/x"},
}


def recipe(**changes: Any) -> Recipe:
    """Return BASE with `a__0__b=value` set at a.0.b; None removes a key."""
    values = deepcopy(BASE)
    for address, value in changes.items():
        holder: Any = values
        *parents, last = (int(p) if p.isdigit() else p for p in address.split("__"))
        for step in parents:
            holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
        if value is None:
            del holder[last]
        else:
            holder[last] = deepcopy(value)
    return Recipe.model_validate(values)


def test_a_valid_recipe_has_no_clashes() -> None:
    assert check(recipe()) == []


def test_an_optimizer_whose_library_is_missing_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = {"optimizer": "schedule_free", "lr_scheduler": "constant"}
    averaged = recipe(**{f"stages__0__train__{key}": value for key, value in train.items()})
    assert check(averaged) == []
    monkeypatch.setattr("dtrain.config.train_checks.find_spec", lambda name: None)
    (clash,) = check(averaged)
    assert "pip install 'dtrain[schedule-free]'" in str(clash)


ALPACA = {"path": "b.json", "format": "alpaca"}
TEXT = {"path": "a.txt", "format": "text"}
STAGE = BASE["stages"][0]
PAIRS = {"path": "p.json", "format": "preference"}
EWC, L2_INIT = {"kind": "ewc", "weight": 1.0}, {"kind": "l2_init", "weight": 1.0}
PAIR_STAGE = STAGE | {"kind": "dpo", "data": {"sources": [PAIRS]}}


BY_STEP = [{"after_steps": 0, "weight": 1.0}]
EPOCHS = {"stages__0__train__epochs": 2.0}


def weights(*sources: list[tuple[int, float]]) -> dict[str, Any]:
    """Return recipe changes: sources with these weights after these steps."""
    lists = [[{"after_steps": a, "weight": w} for a, w in source] for source in sources]
    return {"stages__0__data__sources": [TEXT | {"weight": entries} for entries in lists]}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"stages__0__train__epochs": 1.0}, ["stages.0.train.epochs", "stages.0.train.steps"]),
        ({"stages__0__train__steps": None}, ["stages.0.train.epochs", "stages.0.train.tokens"]),
        ({"stages": [STAGE, STAGE]}, ["stages.0.name", "stages.1.name"]),
        ({"stages__0__name": "report.html"}, ["stages.0.name"]),
        ({"stages__0__name": "base"}, ["stages.0.name"]),
        (
            {"stages__0__train__early_stopping_patience": 3},
            ["early_stopping_patience", "evaluate_every_steps"],
        ),
        ({"stages__0__train__evaluate_on": "domain"}, ["evaluate_on", "evaluate_every_steps"]),
        (
            {"stages__0__train__evaluate_on": "no", "stages__0__train__evaluate_every_steps": 1},
            ["evaluate_on", "evaluation.sets", "use one of domain"],
        ),
        (
            {"stages__0__train__evaluate_every_steps": 1, "evaluation": {}},
            ["evaluate_every_steps", "evaluation.sets"],
        ),
        (
            {"output__use": "best", "stages__0__train__evaluate_every_steps": 2},
            ["output.use", "checkpoint_every_steps", "nothing saves this stage on the way"],
        ),
        (
            {
                "output__use": "best",
                "stages__0__train__evaluate_every_steps": 2,
                "stages__0__train__checkpoint_every_steps": 5,
            },
            ["output.use", "the first would be 10", "checkpoint_every_steps=2"],
        ),
        (
            {
                "evaluation__sets__domain": {
                    "kind": "dpo",
                    "calibration": True,
                    "sources": [PAIRS],
                },
            },
            ["evaluation.sets.domain.kind", "calibration", "dpo has no cross-entropy"],
        ),
        ({"stages__0__train__maximize": "accuracy"}, ["train.maximize", "evaluate_every_steps"]),
        (
            {"model__tokens": {"add": ["<a>"]}, "stages__0__method": {"kind": "ia3"}},
            ["model.tokens", "method.kind", "modules_to_save=[embed_tokens, lm_head]"],
        ),
        (
            {
                "model__tokens": {"add": ["<a>"]},
                "stages__0__method": {"kind": "full", "trainable_layers": 1},
            },
            ["model.tokens", "method.kind", "full would leave the new tokens as they start"],
        ),
        (
            {
                "stages__0__train__maximize": "accuracy",
                "stages__0__train__evaluate_every_steps": 2,
            },
            ["train.maximize", "train.evaluate_on", "kind cpt reports no metric"],
        ),
        (
            {"stages__0__train__decay_ratio": 0.2},
            ["lr_scheduler", "decay_ratio", "cosine has no decay_ratio", "warmup_stable_decay"],
        ),
        (
            {
                "stages__0__train__lr_scheduler": "warmup_stable_decay",
                "stages__0__train__decay_ratio": 1.0,
            },
            ["train.warmup_ratio", "train.decay_ratio"],
        ),
        (
            {"stages__0": PAIR_STAGE, "stages__0__train__label_smoothing": 0.1},
            ["stages.0.kind", "train.label_smoothing", "preference.label_smoothing"],
        ),
        (
            {"stages__0": PAIR_STAGE, "stages__0__data__sources": [PAIRS | {"loss_weight": 2.0}]},
            ["stages.0.kind", "stages.0.data.sources.0.loss_weight"],
        ),
        (
            {"evaluation__sets__domain__sources": [TEXT | {"loss_weight": 2.0}]},
            ["evaluation.sets.domain.sources.0.loss_weight"],
        ),
        (
            {"stages__0__train__learning_rate_scales": {"(": 2.0}},
            ["train.learning_rate_scales.(", "not a regular expression"],
        ),
        ({"engine": {"offload": True}}, ["engine.offload", "engine.kind", "auto"]),
        ({"engine": {"kind": "zero2", "offload": True}}, ["engine.offload", "engine.kind"]),
        ({"engine": {"kind": "ddp", "shard": "node"}}, ["engine.shard", "engine.kind", "ddp"]),
        ({"engine": {"kind": "ddp", "config": "a.json"}}, ["engine.config", "engine.kind"]),
        ({"engine": {"kind": "zero2", "config": "no/a.json"}}, ["engine.config", "no/a.json"]),
        (
            {
                "engine": {"kind": "zero3"},
                "stages__0__train__optimizer": "paged_adamw_8bit",
            },
            ["stages.0.train.optimizer", "engine.kind", "zero3"],
        ),
        *(
            (
                {"engine": {"kind": engine}, "stages__0__train__optimizer": optimizer},
                ["stages.0.train.optimizer", "engine.kind", "whole parameters", "adamw or lion"],
            )
            for engine, optimizer in (("fsdp2", "adafactor"), ("zero2", "lion_8bit"))
        ),
        (
            {"stages__0__train__optimizer": "muon"},
            ["stages.0.train.optimizer", "stages.0.method.kind", "lora trains none"],
        ),
        (
            {"stages__0__method": {"kind": "full", "frozen_modules": ["(?=a)"]}},
            ["method.frozen_modules.(?=a)", "linear time"],
        ),
        (
            {"stages__0__train__optimizer": "schedule_free"},
            ["train.optimizer", "train.lr_scheduler", "lr_scheduler=constant"],
        ),
        ({"engine": {"kind": "fsdp2"}, "determinism": "strict"}, ["determinism", "engine.kind"]),
        (
            {"stages__0__data__sources": [TEXT | {"weight": 1.0}, TEXT]},
            ["stages.0.data.sources.0.weight", "stages.0.data.sources.1.weight"],
        ),
        (
            weights([(0, 1.0)], [(10, 1.0)]),
            ["stages.0.data.sources.1.weight", "[10]", "start with after_steps: 0"],
        ),
        (weights([(0, 1.0), (9, 1.0), (9, 2.0)]), ["stages.0.data.sources.0.weight", "[0, 9, 9]"]),
        (
            weights([(0, 1.0), (10**6, 2.0)]),
            ["stages.0.data.sources.0.weight", "stages.0.train.steps", "1000000 steps never"],
        ),
        (
            weights([(0, 1.0), (2, 2.0)]) | {"stages__0__train__steps": None, **EPOCHS},
            ["stages.0.data.sources.0.weight", "stages.0.train.epochs"],
        ),
        (
            weights([(0, 1.0)], [(0, 0.0)]),
            ["stages.0.data.sources.1.weight", "the weight is always 0"],
        ),
        (
            weights([(0, 1.0), (2, 0.0)], [(0, 1.0), (1, 0.0)]),
            ["stages.0.data.sources", "after 2 steps all weights are 0"],
        ),
        (
            {"evaluation__sets__domain__sources": [TEXT | {"weight": BY_STEP}]},
            ["evaluation.sets.domain.sources.0.weight", "no steps"],
        ),
        ({"stages__0__kind": "sft"}, ["stages.0.kind", "stages.0.data.sources.0.format"]),
        (
            {"evaluation__sets__domain__kind": "sft"},
            ["evaluation.sets.domain.kind", "evaluation.sets.domain.sources.0.format"],
        ),
        (
            {"stages__0": PAIR_STAGE | {"kind": "sft"}},
            ["stages.0.kind", "sources.0.format", "each row compares two answers", "kind=dpo"],
        ),
        (
            {"stages__0": PAIR_STAGE | {"kind": "kto"}},
            ["stages.0.kind", "sources.0.format", "each row compares two answers"],
        ),
        (
            {"stages__0": PAIR_STAGE | {"kind": "cpt"}},
            ["stages.0.kind", "sources.0.format"],
        ),
        (
            {"stages__0": PAIR_STAGE, "stages__0__data__sources": [ALPACA]},
            ["stages.0.kind", "sources.0.format"],
        ),
        (
            {"stages__0": PAIR_STAGE, "stages__0__preference": {"target_margin": 1.0}},
            ["stages.0.preference.target_margin", "dpo has no target_margin", "beta, label_smooth"],
        ),
        (
            {
                "stages__0": PAIR_STAGE | {"kind": "simpo"},
                "stages__0__preference": {"precompute_reference": True},
            },
            ["stages.0.preference.precompute_reference", "simpo has no precompute_reference"],
        ),
        (
            {"stages__0__preference": {"beta": 0.2}},
            ["stages.0.preference.beta", "cpt reads no key of preference"],
        ),
        (
            {
                "stages__0": PAIR_STAGE,
                "stages__0__preference": {"loss": "hinge", "label_smoothing": 0.1},
            },
            ["preference.label_smoothing", "preference.loss", "hinge has no label smoothing"],
        ),
        (
            {"stages__0__method": {"kind": "lora", "rank_pattern": {"q_proj(": 4}}},
            ["stages.0.method.rank_pattern.q_proj(", "not a regular expression"],
        ),
        (
            {"stages__0__method": {"kind": "lora", "alpha_pattern": {"(?!q)k_proj": 4.0}}},
            ["stages.0.method.alpha_pattern.(?!q)k_proj", "linear time"],
        ),
        (
            {"stages__0__regularize": EWC},
            ["stages.0.regularize.on", "stages.0.data.replay", "add data.replay"],
        ),
        (
            {"stages__0__regularize": EWC | {"on": "previous_stage"}},
            ["stages.0.regularize.on", "first stage", "on=replay"],
        ),
        (
            {
                "stages__0__method": {"kind": "full"},
                "stages__0__regularize": {"kind": "kl_to_base", "weight": 1.0, "on": "all"},
            },
            ["stages.0.regularize.kind", "stages.0.method.kind", "full does not keep the model"],
        ),
        (
            {
                "stages__0__method": {"kind": "lora", "modules_to_save": ["norm"]},
                "stages__0__regularize": L2_INIT,
            },
            ["stages.0.regularize.kind", "stages.0.method.modules_to_save", "kl_to_base"],
        ),
        (
            {
                "stages__0__method": {"kind": "lora", "router": "train"},
                "stages__0__train__neftune_noise_alpha": 5.0,
            },
            ["method.router", "train.neftune_noise_alpha", "without the noise", "router=frozen"],
        ),
        (
            {"stages__0__method": {"kind": "adalora", "r": 4, "target_r": 8}},
            ["method.target_r", "method.r", "8, is higher", "at most r"],
        ),
        (
            {"stages__0__method": {"kind": "adalora", "final_ratio": 0.9}},
            ["method.initial_ratio", "method.final_ratio", "no step is left", "below 1"],
        ),
        (
            {
                "stages__0__method": {"kind": "adalora"},
                "stages__0__train__optimizer": "schedule_free",
                "stages__0__train__lr_scheduler": "constant",
            },
            ["method.kind", "train.optimizer", "average", "optimizer=adamw"],
        ),
        (
            {
                "stages__0__method": {"kind": "adalora"},
                "engine": {"kind": "zero3", "offload": True},
            },
            ["method.kind", "engine.offload", "offload=false"],
        ),
        (
            {"stages__0__method": {"kind": "dora"}, "stages__0__regularize": L2_INIT},
            ["stages.0.regularize.kind", "stages.0.method.kind", "dora trains", "full or lora"],
        ),
        (
            {
                "stages__0__method": {"kind": "full"},
                "stages__0__regularize": L2_INIT,
                "engine": {"kind": "zero3", "offload": True},
            },
            ["stages.0.regularize.kind", "engine.offload", "norm", "offload=false"],
        ),
        (
            {
                "stages__0__method": {"kind": "lora", "from_adapter": "old"},
                "stages__0__regularize": {"kind": "kl_to_base", "weight": 1.0, "on": "all"},
            },
            ["stages.0.regularize.kind", "stages.0.method.from_adapter", "base and adapter"],
        ),
        (
            {
                "stages__0__method": {"kind": "lora", "from_adapter": "old"},
                "stages__0__kind": "distill",
                "stages__0__data": {"sources": [ALPACA]},
                "stages__0__distill": {"teacher": "base", "ce_weight": 0.5},
            },
            ["stages.0.distill.teacher", "stages.0.method.from_adapter", "with an adapter"],
        ),
        (
            {"stages__0__method": {"kind": "pissa", "from_adapter": "old"}},
            ["stages.0.method.from_adapter", "stages.0.method.kind", "pissa takes its first"],
        ),
        (
            {"stages__0__method": {"kind": "loftq", "from_adapter": "old"}},
            ["stages.0.method.from_adapter", "stages.0.method.kind", "loftq takes its first"],
        ),
        (
            {"launch": {"processes": 3}},
            ["global_batch_size", "micro_batch_size", "launch.processes"],
        ),
        ({"stages__0__train__micro_batch_size": 16}, ["micro_batch_size"]),
        (
            {"model__attention": "flash_attention_2", "device": "cpu"},
            ["model.attention", "device"],
        ),
        (
            {"model__attention": "flash_attention_2", "model__dtype": "float32"},
            ["model.attention", "model.dtype"],
        ),
    ],
)
def test_a_clash_names_the_keys(changes: dict[str, Any], keys: list[str]) -> None:
    clashes = check(recipe(**changes))
    assert len(clashes) == 1, clashes
    for key in keys:
        assert key in str(clashes[0])


def test_all_clashes_are_reported_at_once() -> None:
    problems = check(recipe(engine={"shard": 4, "offload": True}, launch={"processes": 5}))
    assert len(problems) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json:1: is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"zero_optimization": {"stage": 3}, "zero_optimization": 1}', "occurs twice"),
        ("{}", "has no zero_optimization group"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, but engine.kind is zero2"),
        ({"train_batch_size": 4}, "train_batch_size is 4, but the recipe's train.global_batch"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but the recipe's model.dtype"),
        ({"bf16": True}, "bf16 is not a JSON object"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is"),
        ({"gradient_clipping": 1.0}, "train.max_grad_norm decides it"),
        (
            {"csv_monitor": {"enabled": True, "output_path": "/tmp/elsewhere"}},
            "csv_monitor.output_path writes outside the run folder",
        ),
        ({"tensorboard": {"enabled": True, "job_name": "x"}}, "tensorboard writes outside"),
        ({"wandb": {"enabled": "true", "project": "x"}}, "wandb writes outside"),
        ({"comet": {"enabled": True}}, "comet writes outside"),
        (
            {"flops_profiler": {"enabled": True, "output_file": "/tmp/flops"}},
            "flops_profiler.output_file writes outside",
        ),
        (
            {"data_efficiency": {"enabled": True, "data_sampling": {"cluster_path": "/tmp/x"}}},
            "data_efficiency.data_sampling.cluster_path writes outside",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is set, but engine.offload is false",
        ),
    ],
)
def test_invalid_deepspeed_file_is_reported(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.json"
    if isinstance(content, dict):
        content = json.dumps({"zero_optimization": {"stage": 2}} | content)
    path.write_text(content)
    problems = check(recipe(engine={"kind": "zero2", "config": str(path)}))
    assert len(problems) == 1
    assert message in str(problems[0])


@pytest.mark.parametrize(
    "content",
    [
        {"csv_monitor": {"enabled": False, "output_path": "/tmp/elsewhere"}},
        {"flops_profiler": {"enabled": True}},
        {"wall_clock_breakdown": True},
    ],
)
def test_deepspeed_file_may_report_on_the_terminal(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
    assert check(recipe(engine={"kind": "zero2", "config": str(path)})) == []


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 20))
def test_indivisible_batch_is_refused_with_a_suggestion(batch: int, ranks: int, micro: int) -> None:
    try:
        assert accumulation(batch, ranks, micro) * ranks * micro == batch
    except UserError as error:
        assert batch % (ranks * micro)
        proposals = error.fix.removeprefix("use ").split(", or ")
        for number in proposals[0].removeprefix("global_batch_size ").split(" or "):
            assert int(number) % (ranks * micro) == 0 and int(number) > 0
        if proposals[1].startswith("micro_batch_size"):
            assert accumulation(batch, ranks, int(proposals[1].split()[-1])) >= 1
        else:
            assert accumulation(batch, int(proposals[1].split()[0]), 1) >= 1


def test_unmergeable_method_is_refused_if_a_merge_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traits = replace(TRAITS["lora"], cannot_merge="it has no weights")
    monkeypatch.setattr(Lora, "traits_by_kind", {"lora": traits})
    (clash,) = check(recipe())
    message = "stages.0.method.kind and output.merge: lora cannot be merged: it has no weights"
    assert (clash.message, clash.fix) == (
        message,
        "make it the last stage, with output.merge=false",
    )
    assert not check(recipe(output__merge=False))
