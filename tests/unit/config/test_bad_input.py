"""What cannot be trained is refused before any work, with the keys, the reason and a fix.

Each case is a recipe that a user may write: `dtrain check` answers without loading torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError

TEXT = {"path": "a.txt", "format": "text"}
ANSWERS = {"path": "a.json", "format": "messages"}
PAIRS = {"path": "p.json", "format": "preference"}
RATED = {"path": "k.json", "format": "kto"}
LORA, FULL = {"kind": "lora"}, {"kind": "full"}


def stage(kind: str, rows: dict[str, Any], method: dict[str, Any] = LORA, **more: Any) -> Any:
    train = {"global_batch_size": 8, "steps": 10}
    return {
        "name": kind, "kind": kind, "method": method, "data": {"sources": [rows]}, "train": train,
        **more,
    }  # fmt: skip


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
        ["stages.0.distill.teacher", "stages.0.method.kind", "overwrites its teacher", "lora"],
    ),
    "a held-out set's teacher that a stage overwrites": (
        {"stages": [stage("sft", ANSWERS, FULL)], "evaluation": held_out(teacher="base")},
        ["evaluation.sets.rows.distill.teacher", "stages.0.method.kind", "overwrites", "lora"],
    ),
    "beta of another divergence": (
        {"stages": [distill(teacher="t", beta=0.1)]},
        ["stages.0.distill.beta", "stages.0.distill.loss", "has no beta", "loss=jsd"],
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
