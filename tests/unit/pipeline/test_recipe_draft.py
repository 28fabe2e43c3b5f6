"""`dtrain init` writes a recipe that check and plan pass, for what the data hold."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.pipeline.data_survey import survey_data
from dtrain.pipeline.input_checks import check_inputs
from dtrain.pipeline.recipe_draft import Hardware, draft_recipe, recipe_text
from dtrain.planning.fit import FITS
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import make_plan
from dtrain.planning.workload import Cluster

ROWS: dict[str, dict[str, Any]] = {
    "cpt": {"text": "words of a text " * 20},
    "sft": {"instruction": "question", "output": "answer " * 20},
    "dpo": {"prompt": "question", "chosen": "good", "rejected": "bad"},
    "kto": {"prompt": "question", "completion": "good", "label": True},
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def write_rows(name: str, kind: str, count: int) -> str:
    rows = [ROWS[kind] for _ in range(count)]
    if kind == "kto":
        rows[-1] = rows[-1] | {"label": False}
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def drafted(base: str, paths: list[str], hardware: Hardware) -> Recipe:
    surveys = [survey for path in paths for survey in survey_data(path)]
    Path("out.yaml").write_text(recipe_text(draft_recipe("mine", base, surveys, hardware)))
    recipe = load_recipe("out.yaml")
    assert not check_inputs(recipe).errors
    if hardware.cluster is not None:
        assert make_plan(recipe, hardware.cluster).verdict == FITS
    return recipe


def gpus(name: str, on_node: int = 1, nodes: int = 1) -> Hardware:
    return Hardware(Cluster(find_gpu(name), nodes, on_node))


def test_each_kind_of_rows_becomes_a_stage_in_the_order_of_training() -> None:
    paths = [write_rows(f"{kind}.jsonl", kind, 40) for kind in ("kto", "dpo", "sft", "cpt")]
    recipe = drafted("Qwen/Qwen2.5-7B", paths, gpus("a100-80g", 8))
    assert [stage.kind for stage in recipe.stages] == ["cpt", "sft", "dpo", "kto"]
    assert [stage.data.template for stage in recipe.stages][1:] == ["instruction"] * 3
    assert all(stage.train.global_batch_size % 8 == 0 for stage in recipe.stages)
    assert recipe.stages[2].train.learning_rate < recipe.stages[1].train.learning_rate


def test_a_mixed_folder_becomes_a_source_for_each_format() -> None:
    write_rows("docs/a.jsonl", "sft", 3)
    Path("docs/b.md").write_text("a text")
    Path("docs/page.html").write_text("x")
    recipe = drafted("dtrain:tiny-llama", ["docs"], Hardware(None))
    assert [s.path for stage in recipe.stages for s in stage.data.sources] == [
        "docs/**/*.md", "docs/**/*.jsonl",
    ]  # fmt: skip
    assert recipe.device == "cpu" and recipe.launch.processes == 1


@pytest.mark.parametrize(
    ("base", "hardware", "method", "engine"),
    [
        ("Qwen/Qwen2.5-7B", gpus("h100-80g"), "lora", "ddp"),
        ("Qwen/Qwen2.5-14B", gpus("rtx4090"), "qlora", "ddp"),
        ("meta-llama/Llama-3.1-70B", gpus("h100-80g", 8, 2), "lora", "fsdp2"),
        ("meta-llama/Llama-3.1-70B", gpus("h100-80g"), "qlora", "ddp"),
    ],
)
def test_the_plan_chooses_method_and_engine(
    base: str, hardware: Hardware, method: str, engine: str
) -> None:
    recipe = drafted(base, [write_rows("a.jsonl", "sft", 2000)], hardware)
    assert (recipe.stages[0].method.kind, recipe.engine.kind) == (method, engine)


def test_rank_epochs_and_batch_follow_the_amount_of_data() -> None:
    few = drafted("dtrain:tiny-llama", [write_rows("a.jsonl", "sft", 100)], Hardware(None))
    many = drafted("dtrain:tiny-llama", [write_rows("b.jsonl", "sft", 25_000)], Hardware(None))
    values = [(r.stages[0].method.rank, r.stages[0].train.epochs) for r in (few, many)]
    assert values == [(8, 3), (32, 2)]
    assert few.stages[0].train.global_batch_size < many.stages[0].train.global_batch_size == 32


def test_what_does_not_fit_or_cannot_be_read_is_refused() -> None:
    surveys = survey_data(write_rows("a.jsonl", "sft", 3))
    with pytest.raises(UserError, match="does not fit on 1 x 1 rtx4090-24g, even in 4 bits"):
        draft_recipe("x", "meta-llama/Llama-3.1-70B", surveys, gpus("rtx4090"))
    with pytest.raises(UserError, match="dtrain model fetch nobody/known"):
        draft_recipe("x", "nobody/known", surveys, gpus("rtx4090"))
    with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
        survey_data("no.jsonl")


def test_the_command_asks_on_a_terminal_and_never_overwrites(place: Path) -> None:
    write_rows("a.jsonl", "sft", 3)
    command = [sys.executable, "-m", "dtrain", "init", "my.yaml"]
    silent = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert silent.returncode == 2 and "--base: is missing" in silent.stderr
    terminal, other = pty.openpty()
    os.write(terminal, b"dtrain:tiny-llama\nb.jsonl\na.jsonl\n\n\n")
    asked = subprocess.run(command, stdin=other, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    assert "no such file" in asked.stderr  # and the question was asked again
    assert load_recipe("my.yaml").model.base == "dtrain:tiny-llama"
    again = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr
