"""The recipes of a sweep's runs: of each trial, and of the stages that all trials share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.config.schema import Recipe, Stage
from dtrain.config.sweep import Sweep, evaluation_set
from dtrain.sweep.measure import Target
from dtrain.sweep.record import SeedRun, SweepDir


class TrialRecipes:
    """Builds the recipes of a sweep's runs.

    Attributes:
        base: the recipe that the sweep varies.
        target: the loss that is minimized.
        shared: the stages before the first one that a parameter changes; trained once for each
            seed.
    """

    def __init__(self, sweep: Sweep, folder: SweepDir) -> None:
        self._sweep, self._folder = sweep, folder
        self.base = sweep.recipe_of({})
        names = [stage.name for stage in self.base.stages]
        self._last = names.index(sweep.stage) if sweep.stage else len(names) - 1
        self.target = Target(names[self._last], evaluation_set(sweep, self.base))
        changed = [_stage_of(key, names) for key in sweep.parameters]
        self.shared: list[Stage] = self.base.stages[: min([self._last, *changed])]

    def trial(self, parameters: dict[str, Any], run: SeedRun, offset: int) -> Recipe:
        """The recipe of a trial's run.

        Args:
            offset: of its seed from the recipe's.

        Raises:
            UserErrors: the parameters do not fit together.
        """
        recipe = self._sweep.recipe_of(parameters)
        return self._of_run(recipe, run, recipe.stages[: self._last + 1], self.reused(offset))

    def shared_run(self, run: SeedRun) -> Recipe:
        """The recipe of the shared stages."""
        return self._of_run(self.base, run, self.shared, self.base.output.reuse)

    def reused(self, offset: int) -> str | None:
        """The run folder whose finished stages a trial uses."""
        if not self.shared:
            return self.base.output.reuse
        return str(self._folder.run(shared_name(self.base.seed + offset)).path)

    def best(self, parameters: dict[str, Any], run: SeedRun) -> Recipe:
        """The recipe of the best trial, with all stages and the merge.

        Its run folder is that of the trial, so running it continues from there.
        """
        recipe = self._sweep.recipe_of(parameters)
        changes = {"folder": str(self._folder.run(run.name).path), "reuse": self.reused(0)}
        output = recipe.output.model_copy(update=changes)
        return recipe.model_copy(update={"seed": run.seed, "output": output})

    def _of_run(
        self, recipe: Recipe, run: SeedRun, stages: Sequence[Stage], reuse: str | None
    ) -> Recipe:
        is_shared = run.name.startswith("shared/")
        output = recipe.output.model_copy(
            update={
                "folder": str(self._folder.run(run.name).path),
                "merge": is_shared,  # the trials start from it; a trial's own model is not needed
                "reuse": reuse,
            }
        )
        project = recipe.monitoring.project or recipe.name
        return recipe.model_copy(
            update={
                "name": f"{recipe.name}-{Path(run.name).name}",
                "seed": run.seed,
                "stages": list(stages),
                "output": output,
                "monitoring": recipe.monitoring.model_copy(update={"project": project}),
            }
        )


def shared_name(seed: int) -> str:
    """The name of the run of the shared stages with a seed."""
    return f"shared/seed-{seed}"


def trial_name(number: int, seed: int, seeds: int) -> str:
    """The name of a trial's run."""
    return f"trials/{number:04d}" + (f"-seed-{seed}" if seeds > 1 else "")


def _stage_of(key: str, names: Sequence[str]) -> int:
    """The index of the first stage that a key of the recipe changes."""
    group, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if group != "stages":
        return 0
    if name in names:
        return names.index(name)
    return int(name) if name.isdecimal() else 0
