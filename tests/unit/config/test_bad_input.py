"""What cannot be trained is refused before any work, with the keys, the reason and a fix.

Each case is a recipe that a user may write: `dtrain check` answers without loading torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.methods import TRAITS
from dtrain.config.objectives import OBJECTIVES
from dtrain.core.errors import UserError

TEXT = {"path": "a.txt", "format": "text"}
ANSWERS = {"path": "a.json", "format": "messages"}
PAIRS = {"path": "p.json", "format": "preference"}
RATED = {"path": "k.json", "format": "kto"}
LORA, FULL = {"kind": "lora"}, {"kind": "full"}


NO_MERGE = {"kind": next(kind for kind, traits in TRAITS.items() if traits.cannot_merge)}
NOT_MERGED = {"folder": "runs/x", "merge": False}
TRAIN = {"global_batch_size": 8, "steps": 10}
L2_INIT = {"kind": "l2_init", "weight": 1.0}
EWC_PREVIOUS = {"kind": "ewc", "weight": 1.0, "on": "previous_stage"}


def stage(kind: str, rows: dict[str, Any], method: dict[str, Any] = LORA, **more: Any) -> Any:
    return {
        "name": kind, "kind": kind, "method": method, "data": {"sources": [rows]}, "train": TRAIN,
        **more,
    }  # fmt: skip


def replayed(kind: str, method: dict[str, Any], **more: Any) -> Any:
    return stage(kind, ANSWERS, method, **more) | {"data": {"sources": [ANSWERS], "replay": TEXT}}


def distill(method: dict[str, Any] = LORA, **group: Any) -> Any:
    return stage("distill", ANSWERS, method, distill=group)


def held_out(**group: Any) -> Any:
    return {"sets": {"rows": {"kind": "distill", "sources": [ANSWERS], "distill": group}}}


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "pairs in an sft stage": (
        {"stages": [stage("sft", PAIRS)]},
        ["stages.0.kind", "stages.0.data.sources.0.format", "two answers", "kind=dpo"],
    ),
    "rated answers in a dpo stage": (
        {"stages": [stage("dpo", RATED)]},
        ["stages.0.kind", "stages.0.data.sources.0.format", "rates an answer", "kind=kto"],
    ),
    "one answer a row in a kto stage": (
        {"stages": [stage("kto", ANSWERS)]},
        ["stages.0.kind", "stages.0.data.sources.0.format", "has one answer", "kind=sft"],
    ),
    "text in a distill stage": (
        {"stages": [stage("distill", TEXT, distill={"teacher": "t"})]},
        ["stages.0.kind", "stages.0.data.sources.0.format", "no answers", "kind=cpt"],
    ),
    "no teacher": (
        {"stages": [stage("distill", ANSWERS)]},
        ["stages.0.kind", "stages.0.distill", "needs a teacher", "distill={teacher:"],
    ),
    "a teacher that nothing reads": (
        {"stages": [stage("sft", ANSWERS, distill={"teacher": "t"})]},
        ["stages.0.kind", "stages.0.distill", "no teacher", "kind=distill"],
    ),
    "a teacher that the stage equals": (
        {"stages": [distill(teacher="base")]},
        ["stages.0.distill.teacher", "distill.ce_weight", "nothing to learn", "ce_weight above 0"],
    ),
    "a teacher that the stage overwrites": (
        {"stages": [distill(FULL, teacher="base", ce_weight=0.5)]},
        ["stages.0.distill.teacher", "stages.0.method.kind", "full does not keep", "lora"],
    ),
    "a held-out set's teacher that a stage overwrites": (
        {"stages": [stage("sft", ANSWERS, FULL)], "evaluation": held_out(teacher="base")},
        [
            "evaluation.sets.rows.distill.teacher",
            "stages.0.method.kind",
            "does not keep",
            "lora",
            "or evaluation.sets.rows.distill.top_k=64, whose",
        ],
    ),
    "such a set, with a divergence that needs all tokens": (
        {
            "stages": [stage("sft", ANSWERS, {"kind": "loftq"})],
            "evaluation": held_out(teacher="base", loss="reverse_kl"),
        },
        ["loftq does not keep", "rows.distill.top_k=64 with loss=forward_kl"],
    ),
    "a teacher that an adapter has left": (
        {"stages": [distill(LORA | {"from_adapter": "a"}, teacher="base", ce_weight=0.5)]},
        ["stages.0.distill.teacher", "method.from_adapter", "merge that adapter"],
    ),
    "beta of another divergence": (
        {"stages": [distill(teacher="t", beta=0.1)]},
        ["stages.0.distill.beta", "stages.0.distill.loss", "has no beta", "loss=jsd"],
    ),
    "a key of another objective": (
        {"stages": [stage("kto", RATED, preference={"loss": "ipo"})]},
        ["stages.0.kind", "stages.0.preference.loss", "kto has no loss", "kto reads beta"],
    ),
    "a reference that nothing compares with": (
        {"stages": [stage("simpo", PAIRS, preference={"precompute_reference": True})]},
        ["stages.0.preference.precompute_reference", "simpo has no precompute_reference", "remove"],
    ),
    "smoothed tokens in a dpo stage": (
        {"stages": [stage("dpo", PAIRS, train=TRAIN | {"label_smoothing": 0.1})]},
        ["stages.0.kind", "train.label_smoothing", "preference.label_smoothing"],
    ),
    "weighed tokens in a distill stage": (
        {"stages": [stage("distill", ANSWERS | {"loss_weight": 2.0}, distill={"teacher": "t"})]},
        ["stages.0.kind", "sources.0.loss_weight", "no cross-entropy of single tokens", "remove"],
    ),
    "an objective of another tool": (
        {"stages": [stage("ppo", PAIRS)]},
        ["stages.0.kind must be one of cpt, sft, distill, dpo", "did you mean dpo?"],
    ),
    "a key of another method": (
        {"stages": [stage("sft", ANSWERS, {"kind": "ia3", "r": 8})]},
        ["stages.0.method.r: ia3 has no r", "remove it, or kind=lora or qlora"],
    ),
    "4 bits of a method that has a kind for them": (
        {"stages": [stage("sft", ANSWERS, {"kind": "dora", "quantize": "nf4"})]},
        ["stages.0.method.quantize: dora has no quantize", "kind=qdora"],
    ),
    "a method that cannot merge before another stage": (
        {"stages": [stage("cpt", TEXT, NO_MERGE), stage("sft", ANSWERS)], "output": NOT_MERGED},
        ["stages.0.method.kind", "output.merge", "cannot be merged: its", "make it the last stage"],
    ),
    "a method that cannot merge, merged": (
        {"stages": [stage("sft", ANSWERS, NO_MERGE)]},
        ["stages.0.method.kind", "output.merge", "cannot be merged: its", "output.merge=false"],
    ),
    "a penalty on a change that the method does not make": (
        {"stages": [stage("sft", ANSWERS, {"kind": "dora"}, regularize=L2_INIT)]},
        ["stages.0.regularize.kind", "stages.0.method.kind", "dora trains neither", "full or lora"],
    ),
    "a divergence from a base that is overwritten": (
        {"stages": [replayed("sft", FULL, regularize={"kind": "kl_to_base", "weight": 1.0})]},
        ["stages.0.regularize.kind", "stages.0.method.kind", "full does not keep", "lora"],
    ),
    "a penalty for rows that are not there": (
        {"stages": [stage("sft", ANSWERS, regularize={"kind": "ewc", "weight": 1.0})]},
        ["stages.0.regularize.on", "stages.0.data.replay", "no rows of replay", "add data.replay"],
    ),
    "a penalty for a stage that is not there": (
        {"stages": [stage("sft", ANSWERS, regularize=EWC_PREVIOUS)]},
        ["stages.0.regularize.on", "this is the first stage", "on=replay"],
    ),
    "an optimizer that the engine cannot use": (
        {
            "engine": {"kind": "zero3"},
            "stages": [stage("sft", ANSWERS, train=TRAIN | {"optimizer": "adamw_8bit"})],
        },
        ["stages.0.train.optimizer", "engine.kind", "this is zero3", "engine.kind=ddp"],
    ),
    "strict under an engine that is not": (
        {"engine": {"kind": "fsdp2"}, "determinism": "strict", "stages": [stage("dpo", PAIRS)]},
        ["determinism", "engine.kind", "this is fsdp2", "engine.kind=ddp"],
    ),
    "a gate without a limit": (
        {"stages": [stage("sft", ANSWERS)], "evaluation": {"gates": {"rows": {}}}},
        ["evaluation.gates.rows: set one of"],
    ),
    "top_k of a divergence that needs all": (
        {"stages": [distill(teacher="t", loss="jsd", top_k=8)]},
        ["stages.0.distill.top_k", "stages.0.distill.loss", "all tokens", "loss=forward_kl"],
    ),
    "only cross-entropy": (
        {"stages": [distill(teacher="t", ce_weight=1.0)]},
        ["stages.0.distill.ce_weight", "less than 1"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_a_fix(case: str, tmp_path: Path) -> None:
    changes, words = CASES[case]
    recipe = {"name": "x", "model": {"base": "b"}, "output": {"folder": "runs/x"}, **changes}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    with pytest.raises(UserError) as caught:
        load_recipe(str(path), [])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_method_trains_an_objective_or_says_why_not(kind: str, tmp_path: Path) -> None:
    """Merged and under ddp; what is refused names the method and a fix."""
    rows = {"text": TEXT, "conversation": ANSWERS, "preference": PAIRS, "labeled answer": RATED}
    more = {"distill": {"teacher": "t"}} if OBJECTIVES[kind].needs_teacher else {}
    path = tmp_path / "recipe.yaml"
    for method, traits in TRAITS.items():
        content = rows[sorted(OBJECTIVES[kind].contents)[0]]
        recipe = {
            "name": "x", "model": {"base": "b"}, "output": {"folder": "runs/x"},
            "engine": {"kind": "ddp"}, "stages": [stage(kind, content, {"kind": method}, **more)],
        }  # fmt: skip
        path.write_text(json.dumps(recipe))
        try:
            load_recipe(str(path), [])
        except UserError as error:
            assert traits.cannot_merge and f"{method} cannot be merged" in str(error)
            assert "output.merge=false" in str(error)
        else:
            assert not traits.cannot_merge
