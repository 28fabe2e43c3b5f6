"""dtrain from Python, as far as nothing trains; `tests/integration/test_python_api.py` trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dtrain
from dtrain import Recipe, Run, UserError, load_recipe, plan, run, submit
from dtrain.cli import app
from dtrain.planning.plan import as_json

IMPORTS = """
import sys
import dtrain
assert not [name for name in sys.modules if name.startswith("dtrain.")], "import dtrain is empty"
from dtrain import Recipe, plan, run
print(*sorted(name for name in sys.modules if "." not in name))
"""
HEAVY = {"torch", "transformers", "peft", "datasets", "deepspeed", "accelerate", "numpy", "pandas"}


def values() -> dict[str, Any]:
    return {
        "name": "own",
        "model": {"base": "dtrain:tiny-llama"},
        "launch": {"processes": 1},
        "stages": [
            {
                "name": "task",
                "kind": "sft",
                "method": {"kind": "lora", "r": 4},
                "data": {"sources": [{"path": "dtrain:tiny-text/task.json", "format": "alpaca"}]},
                "train": {"global_batch_size": 2, "steps": 3},
            }
        ],
        "output": {"folder": "runs/own"},
    }


def test_the_import_is_empty_and_the_interface_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dtrain" in done.stdout.split() and not set(done.stdout.split()) & HEAVY


def test_every_public_name_exists_and_others_do_not() -> None:
    assert all(getattr(dtrain, name) for name in dtrain.__all__)
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        dtrain.plam  # noqa: B018


def test_a_recipe_is_built_in_code_or_loaded_and_overridden() -> None:
    built = load_recipe(values(), ["stages.task.method.r=8", "seed=7"])
    assert built == Recipe(**{**values(), "seed": 7, "stages": built.model_dump()["stages"]})
    assert built.stages[0].method.rank == 8
    assert load_recipe("tiny").name == "tiny"


def test_the_values_of_a_recipe_are_not_changed() -> None:
    given = values()
    load_recipe(given, ["stages.task.method.r=8"])
    assert given == values()


@pytest.mark.parametrize("use", [plan, run, submit], ids=lambda use: use.__name__)
def test_errors_are_those_of_a_file(use, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = values()
    wrong["stages"][0]["train"] |= {"epochs": 1, "lr": 1e-4}
    with pytest.raises(UserError) as caught:
        use(wrong)
    assert "stages.0.train.lr: unknown key" in str(caught.value)
    assert "use learning_rate" in str(caught.value) and "only one of them" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_recipe_built_as_a_model_gets_the_checks_across_keys() -> None:
    wrong = values()
    wrong["stages"][0]["train"]["epochs"] = 1.0
    with pytest.raises(UserError, match="only one of them"):
        plan(Recipe(**wrong))


def test_plan_is_that_of_the_command() -> None:
    result = plan("7b-lora", ["engine.kind=zero3"], gpu="a100-40g", nodes=2, gpus_per_node=4)
    words = "plan 7b-lora engine.kind=zero3 --gpu a100-40g --nodes 2 --gpus-per-node 4 --json"
    printed = CliRunner().invoke(app, words.split()).stdout
    assert json.dumps(as_json(result)) == json.dumps(json.loads(printed))


def test_inputs_are_checked_before_a_process_starts(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
    )
    with pytest.raises(UserError, match="is already quantized") as caught:
        run(values(), [f"model.base={base}"])
    assert caught.value.status == 2 and caught.value.where.startswith("model.base: ")
    assert not capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_a_failed_command_is_an_error_with_its_message(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the plan does not know this GPU") as caught:
        submit(values(), gpu="abacus", dry_run=True)
    assert caught.value.status == 2 and caught.value.where == str(tmp_path / "runs" / "own")
    assert "error: " in capsys.readouterr().out


def test_submit_passes_its_options_on(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    job = submit(values(), ["device=cpu"], nodes=2, time="01:00:00", partition="long", dry_run=True)
    script = capsys.readouterr().out
    assert "--nodes=2" in script and "--partition=long" in script and "01:00:00" in script
    assert job == Run(tmp_path / "runs" / "own")
