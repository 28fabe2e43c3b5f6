"""Reading a run folder, whatever is there of it yet."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from dtrain.core.run_dir import EVALUATION, LINEAGE, RECIPE, RunDir
from dtrain.monitoring.metrics import read_metrics


@dataclass(frozen=True)
class Losses:
    """The held-out losses of one evaluation set.

    Attributes:
        name: of the set.
        values: loss by model ("base", then each stage); None if it was not measured.
    """

    name: str
    values: dict[str, float | None]

    @property
    def last(self) -> float | None:
        """The loss of the last model that was measured."""
        measured = [value for value in self.values.values() if value is not None]
        return measured[-1] if measured else None

    @property
    def change(self) -> float | None:
        """The last model's loss minus the base's; None while only one is measured."""
        return self.difference(list(self.values)[-1]) if self.values else None

    def difference(self, model: str) -> float | None:
        """A model's loss minus the base's."""
        base, value = self.values.get("base"), self.values.get(model)
        if base is None or value is None or model == "base":
            return None
        return value - base

    @property
    def percent(self) -> float | None:
        """The change in percent of the base's loss."""
        base = self.values.get("base")
        return 100 * self.change / base if self.change is not None and base else None


@dataclass
class Record:
    """What a run folder holds.

    Attributes:
        folder: the run folder.
        recipe_text, recipe: recipe.yaml as text and as values; empty if it is not there.
        lineage, evaluation: the JSON files' values; empty if they are not there.
        metrics: the lines of each stage's metrics.jsonl, by stage.
        faults: files that are there but cannot be read, and why.
    """

    folder: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, or its folder's."""
        return str(self.recipe.get("name") or self.lineage.get("name") or self.folder.name)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The recipe's stages."""
        return [s for s in self.recipe.get("stages") or [] if isinstance(s, dict) and "name" in s]

    @property
    def artefacts(self) -> dict[str, dict[str, Any]]:
        """The lineage's artefacts, by name."""
        return {str(a["name"]): a for a in self.lineage.get("artefacts") or []}

    @property
    def models(self) -> list[str]:
        """Names of the models whose losses were measured, the base first."""
        return [str(name) for name in self.evaluation.get("models") or []]

    @property
    def losses(self) -> list[Losses]:
        """Held-out losses, a set each."""
        return [
            Losses(str(name), {m: by_model[m] for m in self.models if m in by_model})
            for name, by_model in (self.evaluation.get("losses") or {}).items()
        ]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Questions with the answers of base and final model."""
        return list(self.evaluation.get("answers") or [])

    @property
    def merged(self) -> str | None:
        """Where the last merged model lies, relative to the run folder."""
        merged = [a["merged"] for a in self.artefacts.values() if a.get("merged")]
        return str(merged[-1]) if merged else None


def read_record(folder: Path) -> Record:
    """Read what is there of the run in `folder`; what cannot be read is named in `faults`."""
    record, run = Record(folder), RunDir(folder)
    record.recipe_text = _text(record, RECIPE)
    record.recipe = _mapping(record, RECIPE, _yaml)
    record.lineage = _mapping(record, LINEAGE, json.loads)
    record.evaluation = _mapping(record, EVALUATION, json.loads)
    names = [str(stage["name"]) for stage in record.stages] or list(record.artefacts)
    for name in names:
        if "/" not in name and (lines := read_metrics(run.stage(name).metrics)):
            record.metrics[name] = lines
    return record


def _mapping(record: Record, name: str, parse: Any) -> dict[str, Any]:
    text = _text(record, name)
    if not text.strip():
        return {}
    try:
        value = parse(text)
        if not isinstance(value, dict):
            raise ValueError("not a mapping")
    except (ValueError, YAMLError) as error:
        record.faults.append(f"{name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    return value


def _text(record: Record, name: str) -> str:
    try:
        return (record.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _yaml(text: str) -> Any:
    return YAML(typ="safe").load(text)
