"""A run checks its inputs before training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.models.packing_probe import Layout
from dtrain.pipeline.stage_inputs import (
    check_layout,
    check_same_on_all_ranks,
    limit_micro_batches,
    prepare_inputs,
)

LONG = "a long answer " * 40
EMPTY = {
    "no row": ([], {}, "the source has no rows"),
    "no answer": ([[("user", "q")]], {}, "no trainable tokens"),
    "all too long": (
        [[("user", "q"), ("assistant", LONG)]],
        {"overlong": "drop", "sequence_length": 32},
        "1 longer than a sequence",
    ),
}


def rows_file(path: Path, conversations: list[list[tuple[str, str]]]) -> str:
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]} for turns in conversations]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("case", EMPTY)
def test_an_empty_evaluation_set_is_reported_by_name(tmp_path: Path, case: str) -> None:
    conversations, settings, why = EMPTY[case]
    source = {"path": rows_file(tmp_path / "held.jsonl", conversations), "format": "messages"}
    held = {"kind": "sft", "sources": [source], "template": "instruction", **settings}
    recipe = load_recipe("tiny").model_dump()
    recipe["evaluation"]["sets"] = {"mine": held}
    with pytest.raises(UserError, match="the evaluation set mine is empty") as error:
        prepare_inputs(Recipe.model_validate(recipe))
    assert why in error.value.message and error.value.where == source["path"]


def test_an_empty_stage_is_reported_by_name(tmp_path: Path) -> None:
    recipe = load_recipe("tiny").model_dump()
    path = rows_file(tmp_path / "task.jsonl", [])
    recipe["stages"][1]["data"]["sources"] = [{"path": path, "format": "messages"}]
    with pytest.raises(UserError, match="the data of stage task is empty: the source has no rows"):
        prepare_inputs(Recipe.model_validate(recipe))


def test_the_checking_rank_reports_all_faults_before_it_prepares(tmp_path: Path) -> None:
    """The scripts of launch/ and slurm/ start ranks without `dtrain run`, which checks before."""
    recipe = load_recipe("tiny").model_dump()
    for stage in recipe["stages"]:
        stage["data"]["sources"] = [{"path": f"{stage['name']}.jsonl", "format": "text"}]
    with pytest.raises(UserError, match=r"(?s)domain\.jsonl.*task\.jsonl"):
        prepare_inputs(Recipe.model_validate(recipe), verify=True)


def test_a_rank_with_other_files_is_rejected(tmp_path: Path) -> None:
    recipe = load_recipe("tiny").model_dump()
    first = prepare_inputs(Recipe.model_validate(recipe))
    text = json.dumps(first.fingerprints)
    world: Any = SimpleNamespace(rank=1, broadcast_text=lambda text_of_rank: text)
    check_same_on_all_ranks(first, world)
    recipe["stages"][1]["data"]["sequence_length"] = 96
    inputs = prepare_inputs(Recipe.model_validate(recipe))
    with pytest.raises(
        UserError, match=r"stages\.task\.data: rank 1 reads other content than rank 0"
    ):
        check_same_on_all_ranks(inputs, world)
    with pytest.raises(UserError, match=r"model\.base: rank 1 reads"):
        check_same_on_all_ranks(replace(first, base_fingerprint="another"), world)


def test_packing_of_an_unpackable_model_is_rejected_at_each_key() -> None:
    recipe = load_recipe("tiny").model_dump()
    mixing = AutoConfig.for_model("bloom", vocab_size=256, hidden_size=32, n_head=4, n_layer=2)
    recipe["stages"][1]["data"]["packing"] = False
    recipe["evaluation"]["sets"]["task"]["packing"] = False
    with pytest.raises(UserError, match="'bloom' cannot be packed: its predictions") as error:
        check_layout(Recipe.model_validate(recipe), mixing)
    assert error.value.where == "stages.domain.data.packing, evaluation.sets.domain.packing"
    assert "packing: false" in error.value.fix
    recipe["stages"][0]["data"]["packing"] = False
    recipe["evaluation"]["sets"]["domain"]["packing"] = False
    assert not check_layout(Recipe.model_validate(recipe), mixing).packed


def test_an_unpackable_model_gets_micro_batches_of_one_sequence() -> None:
    recipe = load_recipe("tiny", ["stages.task.train.micro_batch_size=2"])
    assert limit_micro_batches(recipe, Layout(packed=True)) == recipe
    alone = limit_micro_batches(recipe, Layout(packed=False, reason="of a test"))
    assert [stage.train.micro_batch for stage in alone.stages] == [1, 1]
