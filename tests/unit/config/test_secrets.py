"""A secret in an address is refused wherever an address can stand, and shown nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dtrain.cli.root import app
from dtrain.config.load import load_recipe
from dtrain.config.sweep import load_sweep
from dtrain.core.errors import UserError

SECRET = "https://me:hunter2@host/v1"
ROWS = {"path": "a.json", "format": "messages"}
STAGE: dict[str, Any] = {
    "name": "task", "kind": "sft", "method": {"kind": "lora"}, "data": {"sources": [ROWS]},
    "train": {"global_batch_size": 8, "steps": 10},
}  # fmt: skip
GENERATION = {"path": "p.jsonl", "judge": {"endpoint": SECRET, "model": "m"}}
PLACES: dict[str, dict[str, Any]] = {
    "model.base": {"model": {"base": SECRET}},
    "stages.0.data.sources.0.path": {"stages": [STAGE | {"data": {"sources": [{"path": SECRET}]}}]},
    "stages.0.data.replay.path": {
        "stages": [STAGE | {"data": {"sources": [ROWS], "replay": {"path": SECRET}}}]
    },
    "stages.0.distill.teacher": {"stages": [STAGE | {"distill": {"teacher": SECRET}}]},
    "stages.0.from_adapter": {"stages": [STAGE | {"from_adapter": SECRET}]},
    "evaluation.sets.a.sources.0.path": {
        "evaluation": {"sets": {"a": {"kind": "sft", "sources": [{"path": SECRET}]}}}
    },
    "evaluation.generation.a.judge.endpoint": {"evaluation": {"generation": {"a": GENERATION}}},
    "stages.0.adapters.a.sources.0.path": {
        "stages": [STAGE | {"adapters": {"a": {"sources": [{"path": SECRET}]}}}]
    },
    "evaluation.sets": {"evaluation": {"sets": {SECRET: {"kind": "sft", "sources": [ROWS]}}}},
    "nosuchkey": {"nosuchkey": SECRET},
}


@pytest.fixture
def write(tmp_path: Path):
    def write(**keys: Any) -> str:
        recipe = {"name": "x", "model": {"base": "dtrain:tiny-llama"}, "stages": [STAGE], **keys}
        recipe.setdefault("output", {"folder": str(tmp_path / "run")})
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps(recipe))
        return str(path)

    return write


@pytest.mark.parametrize("key", PLACES)
def test_secret_in_a_recipe_is_refused_with_its_key(write, key) -> None:
    with pytest.raises(UserError, match="would be logged") as error:
        load_recipe(write(**PLACES[key]))
    assert f"{key}: " in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        f"stages.task.data.sources.0.path={SECRET}",
        f"nosuchkey={SECRET}",
        f"model.base.deeper={SECRET}",
        "model.base=s3://bucket/a?sig=hunter2",
        f"[{SECRET}",
        SECRET,
    ],
)
def test_secret_in_an_override_is_refused_and_not_shown(write, override) -> None:
    with pytest.raises(UserError, match="would be logged") as error:
        load_recipe(write(), [override])
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("command", ["check", "plan", "run", "submit", "data scan", "data prepare"])
def test_commands_show_and_write_no_secret(write, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write(**PLACES["stages.0.data.sources.0.path"])
    before = set(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, [*command.split(), recipe])
    assert isinstance(done.exception, UserError), done.output
    assert "hunter2" not in f"{done.output}{done.exception}"
    assert set(tmp_path.rglob("*")) == before


def test_secret_in_a_sweep_is_refused(write) -> None:
    for options in (
        {"parameters": {"model.base": [SECRET]}},
        {"parameters": {"model.base": SECRET}},
    ):
        with pytest.raises(UserError, match="would be logged") as error:
            load_sweep(write(), options)
        assert "hunter2" not in str(error.value)


def test_config_of_another_tool_with_a_secret_is_not_imported(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"base_model": "m", "micro_batch_size": 1, "sequence_len": 64, "num_epochs": 1}
    config["datasets"] = [{"path": SECRET, "type": "alpaca"}]
    (tmp_path / "axolotl.yml").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["import", "axolotl.yml"])
    assert isinstance(done.exception, UserError) and "would be logged" in str(done.exception)
    assert "hunter2" not in f"{done.output}{done.exception}"
    assert [path.name for path in tmp_path.iterdir()] == ["axolotl.yml"]


@pytest.mark.parametrize("command", ["check", "data scan", "data show", "data extract"])
def test_secret_of_the_command_line_is_not_repeated(tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["out", "--from", "markdown"] if command == "data extract" else []
    done = CliRunner().invoke(app, [*command.split(), f"{SECRET}/rows.yaml", *more])
    assert isinstance(done.exception, UserError)
    assert "hunter2" not in f"{done.output}{done.exception}"
