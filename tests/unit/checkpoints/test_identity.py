"""A resume with other inputs is refused with a diff, unless the change is allowed."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dtrain.checkpoints import (
    CHANGEABLE,
    changes_allowed_in,
    check_changeable,
    check_same_inputs,
    differences,
)
from dtrain.config.methods import Full, Lora
from dtrain.config.schema import Output
from dtrain.config.train import Train
from dtrain.core.errors import UserError

SAVED = {
    "kind": "cpt",
    "data": "f00d",
    "method": {"r": 8, "target_modules": ["q", "v"]},
    "train": {"learning_rate": 2e-4, "global_batch_size": 8, "steps": None},
}


def _changed(**train: Any) -> dict[str, Any]:
    return {**SAVED, "train": {**SAVED["train"], **train}}  # type: ignore[dict-item]


def test_equal_identities_have_no_differences() -> None:
    assert differences(SAVED, {**SAVED, "method": {"target_modules": ("q", "v"), "r": 8}}) == []
    assert check_same_inputs(SAVED, SAVED, set()) == []


def test_every_difference_is_reported_with_both_values() -> None:
    now = {
        "kind": "cpt",
        "data": "beef",
        "method": {"r": 8, "target_modules": ["q", "k"]},
        "seed": 1,
    }
    assert differences(SAVED, now) == [
        "data: 'f00d' in the checkpoint, 'beef' now",
        "method.target_modules.1: 'v' in the checkpoint, 'k' now",
        "seed: absent in the checkpoint, 1 now",
        "train: {'learning_rate': 0.0002, 'global_batch_size': 8, 'steps': … in the checkpoint, "
        "absent now",
    ]


def test_allowed_change_is_suggested_and_then_reported() -> None:
    now = _changed(learning_rate=1e-4, steps=9)
    with pytest.raises(UserError) as refused:
        check_same_inputs(SAVED, now, {"train.steps"})
    assert "train.learning_rate: 0.0002 in the checkpoint, 0.0001 now" in str(refused.value)
    assert "--allow-change train.learning_rate" in refused.value.fix
    assert "train.steps" not in str(refused.value)
    assert len(check_same_inputs(SAVED, now, {"train.steps", "train.learning_rate"})) == 2


def test_forbidden_change_requires_a_fresh_start() -> None:
    now = _changed(learning_rate=1e-4, global_batch_size=4)
    with pytest.raises(UserError) as refused:
        check_same_inputs(SAVED, now, {"train.learning_rate"})
    assert "--fresh" in refused.value.fix and "--allow-change" not in refused.value.fix


@pytest.mark.parametrize(
    "key", ["train.global_batch_size", "typo", "stages.task.typo", "stages.none.train.steps"]
)
def test_unchangeable_key_cannot_be_allowed(key: str) -> None:
    with pytest.raises(UserError, match=f"`{re.escape(key)}` cannot change"):
        check_changeable(["train.steps", key], ["domain", "task"])


def test_a_key_is_allowed_in_every_stage_or_in_the_stage_that_it_names() -> None:
    keys = ["train.steps", "stages.task.train.learning_rate=1e-4"]
    check_changeable(keys, ["domain", "task"])
    assert changes_allowed_in("domain", keys) == {"train.steps"}
    assert changes_allowed_in("task", keys) == {"train.steps", "train.learning_rate"}


def test_every_changeable_key_is_a_recipe_key() -> None:
    fields = {f"train.{name}" for name in Train.model_fields}
    fields |= {f"method.{name}" for name in {**Lora.model_fields, **Full.model_fields}}
    fields |= {f"output.{name}" for name in Output.model_fields}
    fields.add("output.watched")  # the rows of the set that `output.use: best` compares
    assert fields >= CHANGEABLE
