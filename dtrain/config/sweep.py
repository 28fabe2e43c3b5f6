"""A sweep: the keys of a recipe that are searched, how, and for how long."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from dtrain.config.group import Count, Group, PathText, Text
from dtrain.config.load import check_no_secrets, load_recipe
from dtrain.config.messages import problems
from dtrain.config.schema import Recipe
from dtrain.config.yaml_document import Key, YamlDocument, dotted, parse_value, read_document
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError, UserErrors, nearest_name

TRAINING = "training"  # in place of an evaluation set: the training loss
_RANGE = re.compile(r"(log|uniform|int)\(\s*([^,\s]+)\s*,\s*([^,\s]+)\s*\)")
_SYNTAX = "a list of values, log(1e-5, 1e-3), uniform(0, 0.1) or int(1, 8)"

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Choices:
    """A parameter that takes one of several values."""

    values: tuple[Any, ...]

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values to check before the first trial."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A parameter that is drawn from a range.

    Attributes:
        scale: uniform, log (uniform in the logarithm) or int (whole numbers).
        low, high: both belong to the range.
    """

    scale: str
    low: float
    high: float

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values to check before the first trial."""
        return (self.low, self.high)


class SlurmJobs(Group):
    """The job of each trial, where the sweep runs on Slurm."""

    nodes: Count = Field(1, description="nodes of a trial")
    gpus: Annotated[int, Field(ge=0)] = Field(8, description="GPUs of each node")
    minutes: Count = Field(24 * 60, description="time limit of a trial's job")
    partition: Text | None = Field(None, description="as sbatch takes it")
    account: Text | None = Field(None, description="as sbatch takes it")
    qos: Text | None = Field(None, description="as sbatch takes it")


class Sweep(Group):
    """A file for `dtrain sweep`: many runs of one recipe, to find the lowest loss."""

    recipe: PathText = Field(description="a recipe's file, or the name of a shipped one")
    overrides: list[Text] = Field(
        default_factory=list, description="`key=value` for every trial, as for `dtrain run`"
    )
    parameters: dict[Text, list[Any] | Text] = Field(
        min_length=1, description=f"recipe key → {_SYNTAX}"
    )
    search: Literal["grid", "random", "tpe"] | None = Field(
        None,
        description=(
            "grid: every combination of the lists, with ranges drawn at random; random; tpe: "
            "Optuna's tree-structured Parzen estimator. Default: grid if there is a list, else "
            "random"
        ),
    )
    prune: Literal["off", "median", "hyperband"] = Field(
        "off",
        description=(
            "stop a trial that at one of its evaluations is worse than the median of the finished "
            "ones, or by Hyperband"
        ),
    )
    stage: Text | None = Field(None, description="whose loss is minimized; default: the last")
    evaluate_on: Text | None = Field(
        None,
        description=(
            "evaluation set, or `training` for the training loss; default: the stage's "
            "train.evaluate_on, else the first set, else `training`"
        ),
    )
    seeds: Count = Field(1, description="runs of each trial, with successive seeds")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of the search")
    trials: Count | None = Field(
        None, description="how many; default: every combination of a grid, else 20"
    )
    max_gpu_hours: Positive | None = Field(None, description="no run starts after so many")
    max_hours: Positive | None = Field(None, description="no run starts after so many")
    at_once: Count = Field(1, description="runs at the same time")
    slurm: SlurmJobs | None = Field(
        None, description="run the trials as arrays of Slurm jobs; default: on this machine"
    )
    folder: PathText = Field("runs/sweep", description="the sweep's folder; created if missing")

    @property
    def space(self) -> dict[str, Choices | Range]:
        """The values of each parameter.

        Raises:
            UserError: one is not of the right form.
        """
        return {key: parse_values(key, value) for key, value in self.parameters.items()}

    @property
    def combinations(self) -> int:
        """How many combinations the lists have."""
        count = 1
        for values in self.space.values():
            count *= len(values.values) if isinstance(values, Choices) else 1
        return count

    @property
    def method(self) -> str:
        """`search`, or its default."""
        if self.search is not None:
            return self.search
        has_list = any(isinstance(values, Choices) for values in self.space.values())
        return "grid" if has_list else "random"

    @property
    def number_of_trials(self) -> int:
        """`trials`, or its default."""
        return self.trials or (self.combinations if self.method == "grid" else 20)

    def recipe_of(self, parameters: dict[str, Any]) -> Recipe:
        """The recipe with a trial's values.

        Raises:
            UserErrors: it is not valid.
        """
        return load_recipe(self.recipe, [*self.overrides, *as_overrides(parameters)])


def as_overrides(parameters: dict[str, Any]) -> list[str]:
    """A trial's values as `key=value`."""
    return [f"{key}={json.dumps(value)}" for key, value in parameters.items()]


def parse_values(key: str, value: Any) -> Choices | Range:
    """A parameter's values, as a sweep file or `--sample` writes them.

    Raises:
        UserError: they are not of the right form.
    """
    where = f"parameters.{key}"
    if isinstance(value, list):
        if not value:
            raise UserError("is an empty list", where=where, fix=_SYNTAX)
        return Choices(tuple(value))
    match = _RANGE.fullmatch(str(value).strip())
    try:
        if match is None:
            raise ValueError
        number = int if match[1] == "int" else float
        low, high = number(match[2]), number(match[3])
    except ValueError:
        message = f"{value!r} is not a range of values"
        raise UserError(message, where=where, fix=_SYNTAX) from None
    if not low < high < float("inf") or (match[1] == "log" and low <= 0):
        least = "above 0, " if match[1] == "log" else ""
        fix = f"two finite numbers, {least}the smaller first"
        raise UserError(f"{value} is an empty range", where=where, fix=fix)
    return Range(match[1], low, high)


def load_sweep(address: str, options: dict[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, or make a sweep of a recipe.

    Args:
        address: a sweep file, or a recipe as `load_recipe` takes it.
        options: keys from the command line, which take precedence over the file's.
        overrides: `key=value` for the recipe.

    Raises:
        UserErrors: what is wrong, before any trial; the values of the parameters included.
    """
    document = YamlDocument("the command line", {"recipe": address})
    if user_path(address).is_file():
        file = read_document(user_path(address))
        if "parameters" in file.values:
            document = file
    check_no_secrets(document, overrides)
    check_no_secrets(YamlDocument("the command line", options))
    values: dict[str, Any] = document.values
    for key in ("parameters", "slurm"):
        if key in options:
            written = values.get(key) or {}
            both = {**written, **options[key]} if isinstance(written, dict) else written
            options = {**options, key: both}
    values |= options
    if not values.get("parameters"):
        fix = "add --grid KEY=A,B or --sample 'KEY=log(1e-5,1e-3)', or write a file with parameters"
        raise UserError("has nothing to search", where=address, fix=fix)
    if overrides:
        written = values.get("overrides") or []
        values["overrides"] = [*written, *overrides] if isinstance(written, list) else written
    try:
        sweep = Sweep.model_validate(values)
    except ValidationError as error:
        raise UserErrors(list(_problems(error, document))) from error
    check_sweep(sweep)
    return sweep


def _problems(error: ValidationError, document: YamlDocument) -> Iterator[UserError]:
    """Errors of a sweep's keys, with the nearest known one."""
    unknown: dict[Key, UserError] = {}
    for detail in error.errors():
        key = detail["loc"]
        if detail["type"] == "extra_forbidden":
            group = SlurmJobs if len(key) > 1 else Sweep
            known = list(group.model_fields)
            fix = nearest_name(str(key[-1]), known, f"known: {', '.join(known)}")
            unknown[key] = UserError(
                f"{dotted(key)}: unknown key", where=document.where(key), fix=fix
            )
    yield from (problems(error, document) | unknown).values()


def check_sweep(sweep: Sweep) -> None:
    """Check every value of a sweep against the recipe, before the first trial.

    Raises:
        UserErrors: keys that the recipe does not have, or values that it refuses.
    """
    faults: dict[str, UserError] = {}
    base = sweep.recipe_of({})
    for key, values in sweep.space.items():
        for value in values.examples:
            try:
                sweep.recipe_of({key: value})
            except UserError as error:
                faults |= {str(fault): fault for fault in getattr(error, "errors", [error])}
                break  # the others would most often repeat it
    faults |= {str(fault): fault for fault in _clashes(sweep, base)}
    if faults:
        raise UserErrors(list(faults.values()))


def _clashes(sweep: Sweep, base: Recipe) -> Iterator[UserError]:
    """Keys of a sweep that do not fit its recipe or each other."""
    names = [stage.name for stage in base.stages]
    for key, value, known in (
        ("stage", sweep.stage, names),
        ("evaluate_on", sweep.evaluate_on, [*base.evaluation.sets, TRAINING]),
    ):
        if value is not None and value not in known:
            fix = nearest_name(value, known, f"one of {', '.join(known)}")
            yield UserError(f"the recipe has no {value}", where=key, fix=fix)
    for key in ("seed", "output.folder", "output.reuse", "name"):
        if key in sweep.parameters:
            fix = "use seeds" if key == "seed" else "remove it"
            yield UserError("cannot be searched", where=f"parameters.{key}", fix=fix)
    if sweep.method == "grid" and sweep.number_of_trials < sweep.combinations:
        message = f"{sweep.combinations} combinations need more than {sweep.trials} trials"
        yield UserError(message, where="trials", fix="raise it, or search: random")
    if sweep.max_gpu_hours is not None and base.device == "cpu":
        yield UserError("the recipe trains on CPUs", where="max_gpu_hours", fix="use max_hours")
    if sweep.prune != "off" and (fault := _unpruned(sweep, base)):
        yield fault


def _unpruned(sweep: Sweep, base: Recipe) -> UserError | None:
    """Why no trial could ever be pruned."""
    stage = next((s for s in base.stages if s.name == sweep.stage), base.stages[-1])
    is_measured = stage.train.evaluate_every_steps is not None
    if is_measured or evaluation_set(sweep, base) == TRAINING:
        return None
    where = f"stages.{stage.name}.train.evaluate_every_steps"
    fix = f"set it, or evaluate_on: {TRAINING}"
    return UserError("pruning needs evaluations during the stage", where=where, fix=fix)


def evaluation_set(sweep: Sweep, base: Recipe) -> str:
    """The evaluation set whose loss is minimized, or `training`."""
    if sweep.evaluate_on is not None:
        return sweep.evaluate_on
    stage = next((s for s in base.stages if s.name == sweep.stage), base.stages[-1])
    return stage.train.evaluate_on or next(iter(base.evaluation.sets), TRAINING)


def parse_option(text: str, *, is_list: bool) -> tuple[str, Any]:
    """`key=1,2` of `--grid`, or `key=log(1e-5,1e-3)` of `--sample`.

    Raises:
        UserError: it has no value.
    """
    key, equals, values = text.partition("=")
    option = "--grid" if is_list else "--sample"
    if not equals or not values.strip():
        example = "stages.task.method.r=8,16" if is_list else "stages.task.train.learning_rate=…"
        raise UserError(f"{text!r} has no values", where=option, fix=f"{option} {example}")
    return key.strip(), parse_value(f"[{values}]", option) if is_list else values
