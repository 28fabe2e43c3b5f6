"""Write evaluation.json: held-out losses and scores of the base and after each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from math import inf, isnan
from pathlib import Path
from typing import Any

from dtrain.config.schema import Recipe, Stage
from dtrain.core.files import read_json, write_json
from dtrain.core.hashes import fingerprint
from dtrain.core.log import progress, say
from dtrain.core.run_dir import BASE_MODEL, RunDir
from dtrain.data.loader import Loader
from dtrain.data.packed_dataset import PackedDataset
from dtrain.distributed.world import World
from dtrain.engines.base import Engine
from dtrain.evaluation.gates import check_gates
from dtrain.evaluation.scorer import Scorer
from dtrain.models.packing_probe import Layout
from dtrain.monitoring.metrics import finite
from dtrain.monitoring.run_files import EvaluationFile
from dtrain.monitoring.scores import INPUTS, SCORES, adopt_scores, put_scores
from dtrain.objectives.base import adapters_disabled, build_objective
from dtrain.pipeline.teachers import TeacherModels
from dtrain.training.held_out import HeldOutResult, HeldOutSet, check_maximized, evaluate

BY_MODEL = {
    "losses",
    "blocks",
    "metrics",
    "sources",
}  # in evaluation.json: values by set, then by model


class Evaluations:
    """Measurements of a run's models; every rank measures, the first one writes the file."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        sets: dict[str, PackedDataset],
        layout: Layout,
        teachers: TeacherModels,
        scorers: Sequence[Scorer] = (),
    ) -> None:
        self.scorers = scorers
        self.path, self.recipe, self.sets = RunDir(run).evaluation, recipe, sets
        self.layout, self.teachers = layout, teachers
        objectives = {n: build_objective(s) for n, s in recipe.evaluation.sets.items()}
        for stage in recipe.stages:
            check_maximized(stage.train, objectives)
        fingerprints = {name: self._fingerprint(name) for name in sets}
        self.known: dict[str, Any] = {"models": [], "losses": {}, "sets": fingerprints}
        known = read_json(self.path, EvaluationFile) if self.path.exists() else {}
        if known.get("sets") == fingerprints:  # other losses cannot be compared
            self.known = {k: v for k, v in known.items() if k not in (SCORES, INPUTS)}
        self.inputs = {name: hash for s in scorers for name, hash in s.inputs.items()}
        adopt_scores(self.known, known, known.get(SCORES, {}), self.inputs)

    def _fingerprint(self, name: str) -> str:
        """What decides the figures of a set: its rows and, if it has one, its teacher."""
        held_out = self.recipe.evaluation.sets[name]
        rows, settings = self.sets[name].fingerprint, held_out.distill
        if settings is None:
            return fingerprint([rows, "calibration"]) if held_out.calibration else rows
        group = settings.model_dump(mode="json")
        return fingerprint([rows, group | {"teacher": self.teachers.fingerprint(settings.teacher)}])

    def adopt(self, path: Path, stages: Sequence[str]) -> None:
        """Take over what another run measured of the base and of stages that are reused from it.

        Args:
            path: its evaluation.json; other sets or rows are not comparable, and are ignored.
        """
        known = read_json(path, EvaluationFile) if stages and path.exists() else {}
        if self.known["models"] or known.get("sets") != self.known["sets"]:
            return
        kept = [model for model in known["models"] if model in (BASE_MODEL, *stages)]
        self.known["models"] = kept
        for key in BY_MODEL & known.keys():
            self.known[key] = {
                name: {m: v for m, v in values.items() if m in (*kept, "items")}
                for name, values in known[key].items()
            }
        adopt_scores(self.known, known, kept, self.inputs)

    def wants_base(self) -> bool:
        """Whether the untrained base is still to be measured."""
        scored = self.known.get(SCORES, {}).get(BASE_MODEL, {})
        lacks_scores = any(name not in scored for name in self.inputs)
        return lacks_scores or (bool(self.sets) and BASE_MODEL not in self.known["models"])

    def held_out_sets(self, stage: Stage, world: World) -> dict[str, HeldOutSet]:
        """Every set with its objective, for measurements on the ranks that train a stage."""
        return {
            name: HeldOutSet(
                build_objective(self.recipe.evaluation.sets[name]),
                held_out_loader(dataset, stage, world, self.layout),
            )
            for name, dataset in self.sets.items()
        }

    def record_base(self, engine: Engine, sets: Mapping[str, HeldOutSet]) -> None:
        """Measure the base: without the adapter, or with a fresh one that does not change it."""
        can_disable = engine.stage.method.traits.base_when_disabled
        with adapters_disabled(engine.module) if can_disable else nullcontext():
            self.record(BASE_MODEL, engine, sets)

    def record(self, model: str, engine: Engine, sets: Mapping[str, HeldOutSet]) -> None:
        """Measure every set with the engine's current model, and let it be scored.

        Args:
            model: its name in the file.
            sets: from `held_out_sets`; their objectives know the model that the stage starts from.
        """
        if not self.sets and not self.scorers:
            return
        if self.sets:
            self._record_losses(model, engine, sets)
        for scorer in self.scorers:
            for name, metrics in scorer.measure(engine, model).items():
                put_scores(self.known, model, name, metrics, scorer.inputs[name])
                scores = ", ".join(f"{m} {s.text()}" for m, s in metrics.items())
                say(f"{name}, {model}: {scores or 'written'}")
        if model not in self.known["models"]:
            self.known["models"].append(model)
        self.write(engine.world)

    def _record_losses(self, model: str, engine: Engine, sets: Mapping[str, HeldOutSet]) -> None:
        total = sum(dataset.sequences_per_epoch for dataset in self.sets.values())
        with progress(f"held-out loss, {model}", total) as bar:
            for name, held_out in sets.items():
                result = evaluate(engine, held_out)
                self._keep(name, model, result)
                bar.advance(self.sets[name].sequences_per_epoch, note=f"{name} {result.loss:.4f}")
        losses = ", ".join(f"{n} {self.known['losses'][n][model]:.4f}" for n in self.sets)
        say(f"held-out loss, {model}: {losses}")

    def _keep(self, name: str, model: str, result: HeldOutResult) -> None:
        """Add what was measured on one set to the content of the file."""
        self.known["losses"].setdefault(name, {})[model] = result.loss
        blocks = self.known.setdefault("blocks", {}).setdefault(name, {})
        blocks |= {"items": result.block_items, model: result.block_losses}
        for key, value in (("metrics", result.metrics), ("sources", result.sources)):
            if value:
                self.known.setdefault(key, {}).setdefault(name, {})[model] = value

    def losses_of(self, model: str) -> dict[str, float]:
        """The losses of a model on the sets that it was measured on; NaN counts as infinite."""
        losses = ((name, by_model.get(model)) for name, by_model in self.known["losses"].items())
        return {name: inf if isnan(loss) else loss for name, loss in losses if loss is not None}

    def check_gates(self, model: str) -> None:
        """Raise a UserError if a stage made a set worse than `evaluation.gates` allow."""
        check_gates(self.recipe.evaluation.gates, self.known, model)

    def write(self, world: World) -> None:
        """Write the file, on the first rank."""
        if world.is_first:
            write_json(self.path, finite(self.known))


def held_out_loader(dataset: PackedDataset, stage: Stage, world: World, layout: Layout) -> Loader:
    """Build a loader of all sequences of a held-out set, in batches that ranks share equally."""
    batch = world.size * stage.train.micro_batch
    return Loader(
        dataset,
        seed=0,
        global_batch=batch,
        total_sequences=dataset.sequences_per_epoch,
        alone=not layout.packed,
    )
