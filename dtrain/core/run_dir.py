"""A run folder: the name of every file in it, its lock, its progress and its exit report.

RUN/
  recipe.yaml  starts.jsonl  lineage.json  evaluation.json  report.html  outcome.json
  requested.yaml  refused.json
  predictions/base.jsonl  predictions/STAGE.jsonl  judge.jsonl
  STAGE/   stage.json  metrics.jsonl  checkpoints/step-000200/  adapter/  merged/
  slurm/   attempts.json  jobs.json  job.sh  job.log

A start that finds stages here is only a request until everything that it asks for was checked: its
recipe is requested.yaml, and if it ends before `RunDir.accept`, its exit report is refused.json.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from dtrain.core.errors import UserError
from dtrain.core.files import is_missing, read_json, remove_entry, write_atomic
from dtrain.core.locks import FolderLock, check_record_locks
from dtrain.core.ownership import check_no_link, check_own_folder
from dtrain.core.stage_dir import ADAPTER_CONFIG, CHECKPOINT_MANIFEST, STAGE_RECORD, StageDir

RECIPE = "recipe.yaml"
LINEAGE = "lineage.json"
EVALUATION = "evaluation.json"
PREDICTIONS = "predictions"
JUDGE_REPLIES = "judge.jsonl"
STARTS = "starts.jsonl"
HTML_REPORT = "report.html"
EXIT_REPORT = "outcome.json"
REQUESTED = "requested.yaml"
REFUSED = "refused.json"
STOP = "stop"
SLURM = "slurm"
HEARTBEATS = ".watch"
BASE_MODEL = "base"  # the name, next to those of stages, of the model before all of them
# Names that a stage cannot have.
RESERVED_NAMES = frozenset(
    {
        RECIPE,
        STARTS,
        LINEAGE,
        EVALUATION,
        HTML_REPORT,
        EXIT_REPORT,
        REQUESTED,
        REFUSED,
        STOP,
        SLURM,
        PREDICTIONS,
        JUDGE_REPLIES,
    }
)
# What is written under its name, or into a folder of that name.
IN_PLACE = (STARTS, STOP, SLURM, HEARTBEATS, PREDICTIONS)

# Variable: the run folder whose lock the launcher holds as long as it lives.
LOCKED_BY_LAUNCHER = "DTRAIN_LOCKED_RUN"
LOCK_POLL_SECONDS = 1.0
ASK_SECONDS = 0.05
# `.name.random`: what `write_atomic` and `atomic_folder` write before they rename it.
_PARTIAL = re.compile(
    r"\.((recipe|requested|lineage|evaluation|outcome|refused|stage|report|metrics|trackers)\.\w+"
    r"|adapter|merged)"
    r"\.[a-z0-9_]{8}"
)


class _ExitReport(TypedDict, total=False):
    outcome: str
    status: int
    reason: str
    start: str


@dataclass(frozen=True)
class RunDir:
    """Files of a run, and its lock."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RECIPE

    @property
    def lineage(self) -> Path:
        """What every artifact was made from."""
        return self.path / LINEAGE

    @property
    def evaluation(self) -> Path:
        """Held-out losses and scores."""
        return self.path / EVALUATION

    def predictions(self, model: str) -> Path:
        """The answers of a model, "base" or a stage: a line of JSON for each prompt."""
        return self.path / PREDICTIONS / f"{model}.jsonl"

    @property
    def judge_replies(self) -> Path:
        """The replies of judges."""
        return self.path / JUDGE_REPLIES

    @property
    def starts(self) -> Path:
        """When and where each attempt began."""
        return self.path / STARTS

    @property
    def html_report(self) -> Path:
        """The report as one HTML page."""
        return self.path / HTML_REPORT

    @property
    def exit_report(self) -> Path:
        """How the last accepted start ended."""
        return self.path / EXIT_REPORT

    @property
    def requested(self) -> Path:
        """The recipe of a start that is not accepted, or not yet."""
        return self.path / REQUESTED

    @property
    def refused(self) -> Path:
        """How a start ended that was not accepted."""
        return self.path / REFUSED

    @property
    def start_recipe(self) -> Path:
        """The recipe of the last start, whether it is accepted or not."""
        return self.requested if self.requested.exists() else self.recipe

    @property
    def start_exit_report(self) -> Path:
        """Where the last start reports its end."""
        return self.refused if self.requested.exists() else self.exit_report

    @property
    def stop(self) -> Path:
        """Its existence asks the ranks to save and end."""
        return self.path / STOP

    @property
    def heartbeats(self) -> Path:
        """Folder of the hang watchdog."""
        return self.path / HEARTBEATS

    @property
    def slurm(self) -> Path:
        """Folder of scripts, logs and lists of jobs."""
        return self.path / SLURM

    @property
    def attempts(self) -> Path:
        """The list of attempts."""
        return self.slurm / "attempts.json"

    @property
    def jobs(self) -> Path:
        """The list of submitted jobs."""
        return self.slurm / "jobs.json"

    @property
    def submitted_recipe(self) -> Path:
        """The recipe as it was submitted: a run may still be using `recipe`."""
        return self.slurm / RECIPE

    def job_script(self, kind: str) -> Path:
        """A submitted script; `kind` is job or prepare."""
        return self.slurm / f"{kind}.sh"

    def job_log(self, kind: str) -> Path:
        """The log of a submitted script."""
        return self.slurm / f"{kind}.log"

    def stage(self, name: str) -> StageDir:
        """The folder of a stage."""
        return StageDir(self.path / name)

    def data_like_files(self, stages: Iterable[str]) -> list[Path]:
        """Files of the run, written or not yet, that the reader of rows would take for data."""
        files = [self.starts, self.lineage, self.evaluation, self.exit_report, self.judge_replies]
        files += [self.predictions(BASE_MODEL), self.attempts]
        for stage in map(self.stage, stages):
            files += [stage.record, stage.metrics, stage.merge_manifest]
            files += [stage.adapter / ADAPTER_CONFIG, self.predictions(stage.path.name)]
            files.append(stage.checkpoints / "step-000001" / CHECKPOINT_MANIFEST)
        return files

    def check_exists(self) -> None:
        """Check that this is a run folder.

        Raises:
            UserError: it contains no recipe.
        """
        if self.recipe.is_file():
            return
        reason, fix = f"no {RECIPE} in it", "give the folder that output.folder named"
        if not self.path.exists():
            reason = "it does not exist"
            siblings = {
                path.parent.name: path.parent for path in self.path.parent.glob(f"*/{RECIPE}")
            }
            if near := get_close_matches(self.path.name, siblings, n=1):
                fix = f"did you mean {siblings[near[0]]}?"
        raise UserError(f"is not a run folder: {reason}", where=str(self.path), fix=fix)

    def progress(self) -> dict[str, str]:
        """Progress of each started stage, by name."""
        stages = sorted(path.parent for path in self.path.glob(f"*/{STAGE_RECORD}"))
        return {stage.name: StageDir(stage).progress() for stage in stages}

    def read_exit_report(self) -> dict[str, Any]:
        """The exit report of the last start; empty if there is none.

        Raises:
            UserError: it is damaged.
        """
        path = self.refused if self.refused.exists() else self.start_exit_report
        return read_exit_report(path)

    def lock(self, *, wait_seconds: float = 0.0, fix: str = "") -> FolderLock:
        """Create the folder if it does not exist, and lock it for this process.

        A process whose launcher holds the lock already gets a lock that it need not release.

        Args:
            wait_seconds: how long to wait for another process to release it.
            fix: what a person can do where it stays locked.

        Raises:
            UserError: another run holds it, others may write to the folder, or it is unusable.
        """
        lock, deadline = FolderLock(self.path), time.monotonic() + wait_seconds
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_own_folder(self.path.resolve())
            logs = [self.job_log(kind) for kind in ("job", "prepare")]  # Slurm follows links
            for path in [*(self.path / name for name in IN_PLACE), *logs]:
                check_no_link(path)
            while not lock.acquire() and not _try_again(lock):
                if os.environ.get(LOCKED_BY_LAUNCHER) == str(self.path):
                    break
                if time.monotonic() > deadline:
                    message = f"another run is using this folder ({lock.holder()})"
                    fix = fix or "wait for it, or choose another output.folder"
                    raise UserError(message, where=str(self.path), fix=fix)
                time.sleep(LOCK_POLL_SECONDS)
            check_record_locks(self.path)  # needed by the merge, hours later
        except OSError as error:
            raise self.unusable(error) from error
        return lock

    def request(self, recipe: str, *, keeps_stop: bool = False) -> None:
        """Begin a start: write its recipe; remove the stop file and the end of a refused start.

        Before the first stage has begun there is nothing that the start could spoil, so it is
        accepted at once.

        Args:
            keeps_stop: ranks without a launcher obey a stop file that was there before them.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            if not keeps_stop:
                self.stop.unlink(missing_ok=True)
            self.refused.unlink(missing_ok=True)
            if any(self.path.glob(f"*/{STAGE_RECORD}")):
                write_atomic(self.requested, recipe)
            else:
                self.accept(recipe)
        except OSError as error:
            raise self.unusable(error) from error

    def accept(self, recipe: str) -> None:
        """Make a start's recipe the run's; remove the exit report of the last start.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            write_atomic(self.recipe, recipe)
            for path in (self.exit_report, self.refused, self.requested):  # in this order
                path.unlink(missing_ok=True)
        except OSError as error:
            raise self.unusable(error) from error

    def unusable(self, error: OSError) -> UserError:
        """The error for a run folder that the system refuses."""
        message = f"cannot be used as the run folder: {error.strerror or error}"
        return UserError(message, where=str(self.path), fix="choose another output.folder")


def _try_again(lock: FolderLock) -> bool:
    """Whether the lock is free after all: `FolderLock.is_held` holds it for an instant."""
    time.sleep(ASK_SECONDS)
    return lock.acquire()


def read_exit_report(path: Path) -> dict[str, Any]:
    """An exit report; empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        report: dict[str, Any] = read_json(path, _ExitReport)
    except UserError as error:
        if is_missing(error):  # a new start may have just removed it
            return {}
        raise
    return report


class FolderIdentity:
    """Which folder is at a path now, so that it is noticed if it is moved or deleted.

    Raises:
        OSError: there is none.
    """

    def __init__(self, path: Path) -> None:
        # It stays open until this process ends: no new folder gets the number of a deleted one.
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._path, self._status = path, os.fstat(handle)

    def check(self) -> None:
        """Check that the same folder is still there.

        Raises:
            UserError: it is not.
        """
        with suppress(OSError):
            if os.path.samestat(self._path.stat(), self._status):
                return
        message = "the run folder was moved or deleted while the run used it"
        fix = "put it back, then start it again to resume from its newest checkpoint"
        raise UserError(message, where=str(self._path), fix=fix)


def create_numbered(folder: Path) -> RunDir:
    """Create `folder`, or the first of `folder-2`, `folder-3`, … that does not exist.

    Raises:
        UserError: it cannot be created.
    """
    number = 1
    while True:
        run = RunDir(folder if number == 1 else folder.with_name(f"{folder.name}-{number}"))
        try:
            run.path.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise run.unusable(error) from error
        else:
            return run


def remove_partial_files(folder: Path) -> None:
    """Remove what was being written to a run's or stage's folder when its process was killed."""
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            remove_entry(path)
