"""A sweep's folder, and its record: every trial, what it was started with and how it ended.

SWEEP/
  sweep.json  sweep.html  best.yaml
  trials/0007/  shared/seed-0/     run folders
  logs/0007.log  submitit/

The record is replaced atomically before a run starts and after it has ended, so a sweep that was
killed at any moment continues from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dtrain.config.load import dump
from dtrain.config.schema import Recipe
from dtrain.config.sweep import Sweep
from dtrain.core.errors import UserError
from dtrain.core.files import read_json, write_json
from dtrain.core.run_dir import RunDir

# They change neither the parameters of a trial nor when it is pruned.
FREE_KEYS = ("trials", "max_gpu_hours", "max_hours", "slurm", "folder")

Point = tuple[int, float | None]  # (step, loss); None: not finite


@dataclass(frozen=True)
class SweepDir:
    """The files of a sweep."""

    path: Path

    @property
    def record(self) -> Path:
        """The record of all trials, and the result."""
        return self.path / "sweep.json"

    @property
    def page(self) -> Path:
        """The result as an HTML page."""
        return self.path / "sweep.html"

    @property
    def best_recipe(self) -> Path:
        """The recipe of the best trial."""
        return self.path / "best.yaml"

    @property
    def submitit(self) -> Path:
        """submitit's scripts and logs."""
        return self.path / "submitit"

    def run(self, name: str) -> RunDir:
        """A run's folder, by the run's name."""
        return RunDir(self.path / name)

    def log(self, name: str) -> Path:
        """What a run printed."""
        return self.path / "logs" / f"{name.replace('/', '-')}.log"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SeedRun(_Record):
    """A run of a trial, or of the stages that all trials share.

    Attributes:
        name: of its folder, below the sweep's.
        state: waiting, running, stopping (it was pruned, and saves), pruned, complete or failed.
        value: the loss that is minimized.
        status, reason: how it failed.
        job: id of its Slurm job.
    """

    name: Annotated[str, Field(pattern=r"^(trials|shared)/[a-z0-9-]+$")]
    seed: int
    state: Literal["waiting", "running", "stopping", "pruned", "complete", "failed"] = "waiting"
    value: float | None = None
    status: int = 0
    reason: str = ""
    job: Annotated[str, Field(pattern=r"^[0-9_]*$")] = ""
    seconds: float = 0.0
    gpu_hours: float = 0.0


class Trial(_Record):
    """One choice of values.

    Attributes:
        parameters: recipe key → value.
        state: running until its result is final.
        runs: one for each seed; the later ones are added when the first is complete.
        points: losses of the first run during the stage; up to the last one that counted.
        rungs: what Hyperband has noted of it.
    """

    number: int
    parameters: dict[str, Any]
    state: Literal["running", "pruned", "complete", "failed"] = "running"
    runs: list[SeedRun]
    points: list[Point] = Field(default_factory=list)
    rungs: dict[str, float] = Field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether its result is final."""
        return self.state != "running"

    @property
    def values(self) -> list[float]:
        """The losses of its complete runs, in the order of their seeds."""
        return [run.value for run in self.runs if run.value is not None]

    @property
    def value(self) -> float | None:
        """The mean loss of a complete trial."""
        return sum(self.values) / len(self.values) if self.state == "complete" else None

    @property
    def reason(self) -> str:
        """Why it failed."""
        return next((run.reason for run in self.runs if run.reason), "")


class SweepRecord(_Record):
    """The content of sweep.json.

    Attributes:
        settings: the sweep, with its defaults.
        recipe: that it varies, as YAML.
        working: the folder that the recipe's paths start from.
        seconds: how long the sweep has worked.
        shared: runs of the stages before those that differ, one for each seed.
        best: number of the best trial.
    """

    settings: dict[str, Any]
    recipe: str
    working: str
    seconds: float = 0.0
    shared: list[SeedRun] = Field(default_factory=list)
    trials: list[Trial] = Field(default_factory=list)
    best: int | None = None

    @property
    def runs(self) -> Iterator[SeedRun]:
        """All runs that were started, or wait."""
        yield from self.shared
        for trial in self.trials:
            yield from trial.runs

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all runs that have ended."""
        return sum(run.gpu_hours for run in self.runs)

    def write(self, folder: SweepDir) -> None:
        """Replace the record on disk."""
        complete = [trial for trial in self.trials if trial.value is not None]
        best = min(complete, key=lambda trial: (trial.value, trial.number), default=None)
        self.best = None if best is None else best.number
        write_json(folder.record, self.model_dump(mode="json"))


def read_record(folder: SweepDir) -> SweepRecord:
    """The record of a sweep.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return SweepRecord.model_validate(read_json(folder.record))
    except ValidationError as error:
        problem = error.errors()[0]
        message = f"is not the record of a sweep: {problem['loc']}: {problem['msg']}"
        raise UserError(message, where=str(folder.record), fix="use another folder") from error


def open_record(folder: SweepDir, sweep: Sweep, base: Recipe) -> SweepRecord:
    """The record of a sweep that continues, or a new one.

    Raises:
        UserError: the folder has the record of another sweep, or a damaged one.
    """
    new = SweepRecord(
        settings=sweep.model_dump(mode="json"), recipe=dump(base), working=str(Path.cwd())
    )
    if not folder.record.exists():
        return new
    old = read_record(folder)
    free = [*FREE_KEYS]
    if sweep.method != "tpe" and sweep.prune == "off":
        free.append("at_once")  # otherwise it decides what a trial knows of the earlier ones
    changed = [
        key
        for key, value in new.settings.items()
        if key not in free and old.settings.get(key) != value
    ]
    changed += [key for key in ("recipe", "working") if getattr(old, key) != getattr(new, key)]
    if changed:
        keys = ", ".join(changed).replace("working", "working folder")
        fix = "change it back, or choose another --folder"
        raise UserError(f"holds a sweep with another {keys}", where=str(folder.path), fix=fix)
    old.settings = new.settings
    return old
