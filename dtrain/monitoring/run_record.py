"""Read a run folder, as far as the run has come."""

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
class HeldOutLosses:
    """The held-out losses of one evaluation set.

    Attributes:
        name: name of the set.
        values: loss by model ("base", then each stage); None if it was not measured.
    """

    name: str
    values: dict[str, float | None]

    @property
    def last(self) -> float | None:
        """The loss of the last measured model."""
        measured = [value for value in self.values.values() if value is not None]
        return measured[-1] if measured else None

    @property
    def change(self) -> float | None:
        """The last model's loss minus the base model's; None while only one was measured."""
        return self.difference(list(self.values)[-1]) if self.values else None

    def difference(self, model: str) -> float | None:
        """A model's loss minus the base model's."""
        base, value = self.values.get("base"), self.values.get(model)
        if base is None or value is None or model == "base":
            return None
        return value - base

    @property
    def percent(self) -> float | None:
        """The change in percent of the base model's loss."""
        base = self.values.get("base")
        return 100 * self.change / base if self.change is not None and base else None


@dataclass
class RunRecord:
    """The contents of a run folder.

    Attributes:
        folder: the run folder.
        recipe_text, recipe: recipe.yaml as text and as values; empty if it is missing.
        lineage, evaluation: contents of the JSON files; empty if they are missing.
        metrics: the lines of each stage's metrics.jsonl, by stage.
        errors: files that cannot be read, and why.
    """

    folder: Path
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the run, or of its folder."""
        return str(self.recipe.get("name") or self.lineage.get("name") or self.folder.name)

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The recipe's stages."""
        return [s for s in self.recipe.get("stages") or [] if isinstance(s, dict) and "name" in s]

    @property
    def artifacts(self) -> dict[str, dict[str, Any]]:
        """The artifacts of the lineage, by name."""
        return {str(a["name"]): a for a in self.lineage.get("artefacts") or []}

    @property
    def models(self) -> list[str]:
        """Names of the evaluated models, the base model first."""
        return [str(name) for name in self.evaluation.get("models") or []]

    @property
    def losses(self) -> list[HeldOutLosses]:
        """Held-out losses of each evaluation set."""
        return [
            HeldOutLosses(str(name), {m: by_model[m] for m in self.models if m in by_model})
            for name, by_model in (self.evaluation.get("losses") or {}).items()
        ]

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Questions with the answers of the base model and the final model."""
        return list(self.evaluation.get("answers") or [])

    @property
    def merged(self) -> str | None:
        """Path of the last merged model, relative to the run folder."""
        merged = [a["merged"] for a in self.artifacts.values() if a.get("merged")]
        return str(merged[-1]) if merged else None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; files that cannot be read are listed in `errors`."""
    record, run = RunRecord(folder), RunDir(folder)
    record.recipe_text = _read_text(record, RECIPE)
    record.recipe = _read_mapping(record, RECIPE, _yaml)
    record.lineage = _read_mapping(record, LINEAGE, json.loads)
    record.evaluation = _read_mapping(record, EVALUATION, json.loads)
    names = [str(stage["name"]) for stage in record.stages] or list(record.artifacts)
    for name in names:
        if "/" not in name and (lines := read_metrics(run.stage(name).metrics)):
            record.metrics[name] = lines
    return record


def _read_mapping(record: RunRecord, name: str, parse: Any) -> dict[str, Any]:
    text = _read_text(record, name)
    if not text.strip():
        return {}
    try:
        value = parse(text)
        if not isinstance(value, dict):
            raise ValueError("not a mapping")
    except (ValueError, YAMLError) as error:
        record.errors.append(f"{name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    return value


def _read_text(record: RunRecord, name: str) -> str:
    try:
        return (record.folder / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _yaml(text: str) -> Any:
    return YAML(typ="safe").load(text)
