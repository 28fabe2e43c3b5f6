"""The recipe's JSON Schema accepts what loads, and refuses what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dtrain.config.json_schema import json_schema
from dtrain.config.load import apply_overrides, load_recipe
from dtrain.config.yaml_document import YamlDocument, read_document
from dtrain.core.errors import UserError
from dtrain.recipes import shipped

VALIDATOR = jsonschema.Draft202012Validator(json_schema())
ADAPTERS = """\
name: several
model: {base: some/folder}
stages:
  - name: task
    kind: sft
    method: {kind: lora}
    adapters: {legal: {sources: [{path: a.json}]}, code: {sources: [{path: b.json}]}}
    train: {global_batch_size: 4, steps: 2}
output: {folder: runs/several, merge: false}
"""


def is_valid(document: YamlDocument) -> bool:
    return bool(VALIDATOR.is_valid(document.values))


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    VALIDATOR.validate(read_document(shipped()[name]).values)


@pytest.mark.parametrize(
    "override",
    [
        "sede=1",
        "engine.kind=zero4",
        "stages.task.method.alfa=16",
        "stages.task.method={kind: ia3, r: 16}",
        "stages.task.method={kind: qlorra}",
        "stages.task.train.global_batch_size=0",
        "stages.task.train.learning_rate='1e-4'",
        "stages.task.data={sequence_length: 64}",
        "evaluation.sets.task.kind=sfft",
        "stages.task.regularize={kind: ewc, weight: 1.0, on: all}",
    ],
)
def test_what_the_loader_refuses_is_invalid(override: str) -> None:
    document = read_document(shipped()["tiny"])
    assert is_valid(document) and not apply_overrides(document, [override])
    with pytest.raises(UserError):
        load_recipe("tiny", [override])
    assert not is_valid(document)


def test_a_stage_has_sources_or_adapters(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(ADAPTERS)
    document = read_document(tmp_path / "recipe.yaml")
    assert len(load_recipe(str(tmp_path / "recipe.yaml")).stages) == 2 and is_valid(document)
    stage: dict[str, Any] = document.values["stages"][0]
    stage["adapters"]["legal"]["path"] = "a.json"
    assert not is_valid(document)
    del stage["adapters"]
    assert not is_valid(document)


def test_the_command_prints_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "schema"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == json_schema()
