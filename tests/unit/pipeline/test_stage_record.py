"""A stage is the same one under a later dtrain, whose recipes have more keys."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.checkpoints.identity import CHANGEABLE
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed, write_sealed
from dtrain.core.run_dir import RunDir
from dtrain.pipeline import precompute
from dtrain.pipeline.reuse import _mismatch
from dtrain.pipeline.stage_record import FREE_KEYS, StageRecord, stage_record

COMPLETE = {"complete": True, "allowed": [], "files": {}, "facts": {}}
# Written whatever their value is.
ALWAYS = {("data", "template"), ("data", "loss_weights"), *(("train", key) for key in FREE_KEYS)}


def record(run: Path, *overrides: str, stage: int = 1) -> StageRecord:
    recipe = load_recipe("tiny", [f"output.folder={run}", *overrides])
    inputs: Any = SimpleNamespace(
        stages={s.name: SimpleNamespace(fingerprint="of the data") for s in recipe.stages},
        sets={},
        tokenizer_fingerprint="t",
    )
    return stage_record(run, recipe, recipe.stages[stage], inputs, "parent")


def write(record: StageRecord, inputs: dict[str, Any]) -> None:
    """As another dtrain did, which had these inputs."""
    record.path.mkdir(parents=True, exist_ok=True)
    identity = StageRecord(record.path, inputs).identity
    write_sealed(record.record, {"identity": identity, "inputs": inputs, **COMPLETE})


def paths(values: dict[str, Any], start: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All keys of nested groups."""
    for key, value in values.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from paths(value, (*start, key))


def without(inputs: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    older = deepcopy(inputs)
    group = older
    for key in path[:-1]:
        group = group[key]
    del group[path[-1]]
    return older


@pytest.mark.parametrize("method", ["lora", "full", "adalora"])
def test_a_key_that_came_later_changes_nothing_by_its_default(tmp_path: Path, method: str) -> None:
    """Of every key that the recipe does not name; all at once, and each by itself."""
    method = f"stages.task.method={{kind: {method}}}"
    now = record(tmp_path / "new", method)
    recipe = load_recipe("tiny", [method])
    named = set(paths(recipe.stages[1].model_dump(exclude_defaults=True))) | ALWAYS
    settings = recipe.stages[1].model_dump(exclude={"data": {"sources", "replay"}})
    later = [path for path in paths(settings) if path not in named]
    assert ("method", "router") in later and len(later) > 20
    older = now.inputs
    for number, path in enumerate(later):
        write(record(tmp_path / str(number)), without(now.inputs, path))
        assert record(tmp_path / str(number), method).is_complete(), path
        if all(path[:n] not in later for n in range(1, len(path))):
            older = without(older, path)
    write(record(tmp_path / "old"), older)
    assert record(tmp_path / "old", method).is_complete()
    # Later stages name their parent by its identity.
    written = read_sealed(RunDir(tmp_path / "old").stage("task").record)
    assert record(tmp_path / "old", method).identity == written["identity"] != now.identity


def test_another_value_of_a_key_that_came_later_is_refused(tmp_path: Path) -> None:
    older = without(without(record(tmp_path).inputs, ("method", "experts")), ("method", "router"))
    write(record(tmp_path), older)
    for override in ("stages.task.method.experts=false", "stages.task.method.router=train"):
        assert not record(tmp_path, override).is_complete()
        with pytest.raises(UserError, match=override.split(".")[-1].split("=")[0]) as refused:
            record(tmp_path, override).check_same_inputs(set(CHANGEABLE))
        assert "absent in the checkpoint" in refused.value.message


def test_a_stage_of_an_older_dtrain_is_reused(tmp_path: Path) -> None:
    older = without(record(tmp_path / "old").inputs, ("method", "router"))
    write(record(tmp_path / "old"), older)
    folder = record(tmp_path / "new", f"output.reuse={tmp_path / 'old'}")
    source = RunDir(tmp_path / "old").stage("task")
    assert _mismatch(StageRecord(source.path, folder.inputs), needs_merged=False) == ""


def test_routers_that_an_older_dtrain_trained_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute, "routers", lambda model: {"layers.0.mlp.gate"})
    method = load_recipe("tiny", ["stages.task.method={kind: full}"]).stages[1].method
    setup: Any = SimpleNamespace(stage=SimpleNamespace(method=method))
    checkpoint: Any = SimpleNamespace(
        names=["layers.0.mlp.gate_up.weight", "layers.0.mlp.gate.weight"], folder="steps"
    )
    engine: Any = SimpleNamespace(module=None)
    with pytest.raises(UserError, match=r"trained the routers too \(layers.0.mlp.gate.weight\)"):
        precompute._check_routers(checkpoint, setup, engine)
    adapter = load_recipe("tiny", ["stages.task.method={kind: lora, r: 1}"]).stages[1].method
    lora: Any = SimpleNamespace(stage=SimpleNamespace(method=adapter))
    precompute._check_routers(checkpoint, lora, engine)  # trains none, whatever looks like one
    checkpoint.names.pop()
    precompute._check_routers(checkpoint, setup, engine)
