"""A teacher that cannot teach is refused before the training, with the reason and a fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.pipeline.stage_inputs import prepare_inputs
from dtrain.samples.make import ensure


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ensure("tiny-llama"), tmp_path / "teacher"))


def prepare(teacher: Path) -> Any:
    """Prepare the task of `tiny`, taught by a model."""
    recipe = load_recipe("tiny").model_dump()
    distilled = {"kind": "distill", "distill": {"teacher": str(teacher)}}
    recipe["stages"] = [recipe["stages"][1] | distilled]
    recipe["evaluation"]["sets"] = {}
    return prepare_inputs(Recipe.model_validate(recipe))


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_copy_of_the_base_may_teach(teacher: Path) -> None:
    inputs = prepare(teacher)
    found = inputs.teachers[str(teacher)]
    assert found.folder == teacher and found.fingerprint == inputs.base_fingerprint
    assert inputs.fingerprints[f"teacher {teacher}"] == found.fingerprint


def swap_two_tokens(teacher: Path) -> None:
    def swap(rules: Any) -> None:
        vocabulary = rules["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    change_json(teacher / "tokenizer.json", swap)


def remove(teacher: Path) -> None:
    shutil.rmtree(teacher)


@pytest.mark.parametrize(
    ("damage", "reason", "fix"),
    [
        (swap_two_tokens, "reads other tokens than model.base: its 'a' is number", "kind: sft"),
        (remove, "there is no folder", ""),
    ],
)
def test_a_teacher_that_cannot_teach(teacher: Path, damage: Any, reason: str, fix: str) -> None:
    damage(teacher)
    with pytest.raises(UserError) as caught:
        prepare(teacher)
    assert caught.value.where == "stages.task.distill.teacher"
    assert reason in caught.value.message and fix in (caught.value.fix or "")
