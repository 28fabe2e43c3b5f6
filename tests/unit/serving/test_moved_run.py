"""Adapters find their base after their run folder was moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.core.run_dir import BASE_MODEL
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.merge.combine_adapters import combine_adapters
from dtrain.models.peft_format import adapter_base, base_reference
from dtrain.serving.adapter_list import list_adapters
from dtrain.serving.run_models import served_models

Make = Callable[..., Path]
LAYERS = {"model.layers.0.self_attn.q_proj": (8, 8)}


def named_base(adapter: Path) -> str:
    return json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("{run}/domain/merged", "../../domain/merged"),  # moves with the run
        ("/models/llama", "/models/llama"),  # stays where it is
        ("{run}-old/merged", "{run}-old/merged"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ],
)
def test_base_is_named_by_hub_id_or_by_a_path_that_stays_right(
    base: str, expected: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    named = base_reference(base.format(run=run), run / "task" / "adapter", run)
    assert named == expected.format(run=run)


def test_adapter_and_combined_adapter_of_a_moved_run_find_their_base(
    tmp_path: Path, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    (run / "domain" / "merged").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    for stage in ("task", "style"):
        reference = "../../domain/merged"
        make_adapter(run / stage / "adapter", LAYERS, 2, base_model_name_or_path=reference)
    combine_adapters(run / "task/adapter", run / "style/adapter", run / "both")
    combine_adapters(run / "task/adapter", run / "style/adapter", tmp_path / "outside")
    assert named_base(run / "both") == "../domain/merged"
    assert named_base(tmp_path / "outside") == str(run / "domain/merged")
    moved.parent.mkdir()
    run.rename(moved)
    (moved / "recipe.yaml").unlink()  # as single adapters, without a run that knows better
    monkeypatch.chdir(moved / "task")
    for folder in (Path("adapter"), moved / "style" / "adapter", Path("../both")):
        assert adapter_base(folder) == str(moved / "domain" / "merged")
    assert served_models("adapter")[BASE_MODEL].base == str(moved / "domain" / "merged")
    listed = {adapter.base for adapter in list_adapters(moved)}
    assert listed == {str(moved / "domain" / "merged")}


def test_relative_base_of_another_program_starts_from_the_working_folder(
    tmp_path: Path, make_adapter: Make
) -> None:
    adapter = make_adapter(tmp_path / "a", LAYERS, 2, base_model_name_or_path="./models/llama")
    assert adapter_base(adapter) == "./models/llama"


def test_stage_names_the_merged_model_before_it_by_a_relative_path(run: Path) -> None:
    assert named_base(run / "task" / "adapter") == "../../domain/merged"
    assert Path(named_base(run / "domain" / "adapter")).is_absolute()  # a sample, in the cache
