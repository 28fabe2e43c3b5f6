"""What a run reads is looked at before anything trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.pipeline.inputs import prepare_inputs

LONG = "a long answer " * 40
EMPTY = {
    "no row": ([], {}, "there is no row in it"),
    "no answer": ([[("user", "q")]], {}, "there is nothing to learn"),
    "all too long": (
        [[("user", "q"), ("assistant", LONG)]],
        {"overlong": "drop", "sequence_tokens": 32},
        "1 longer than a sequence",
    ),
}


def rows_file(path: Path, conversations: list[list[tuple[str, str]]]) -> str:
    rows = [{"messages": [{"role": r, "content": c} for r, c in one]} for one in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_evaluation_set_is_called_empty_by_its_name(tmp_path: Path, case: str) -> None:
    conversations, settings, why = EMPTY[case]
    source = {"path": rows_file(tmp_path / "held.jsonl", conversations), "format": "messages"}
    held = {"kind": "sft", "sources": [source], "template": "instruction", **settings}
    recipe = load_recipe("tiny").model_dump()
    recipe["evaluation"]["sets"] = {"mine": held}
    with pytest.raises(UserError, match="the evaluation set mine is empty") as error:
        prepare_inputs(Recipe.model_validate(recipe))
    assert why in error.value.what and error.value.where == source["path"]


def test_an_empty_stage_is_called_empty_by_its_name(tmp_path: Path) -> None:
    recipe = load_recipe("tiny").model_dump()
    path = rows_file(tmp_path / "task.jsonl", [])
    recipe["stages"][1]["data"]["sources"] = [{"path": path, "format": "messages"}]
    with pytest.raises(UserError, match="the data of stage task is empty: there is no row in it"):
        prepare_inputs(Recipe.model_validate(recipe))
