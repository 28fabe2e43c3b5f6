"""A recipe as a job of Slurm: its script, the words of sbatch, the submission."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from dtrain.config.checks import check_batches
from dtrain.config.load import dump
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.file_types import JobId, Seconds
from dtrain.core.files import read_json, write_atomic, write_json
from dtrain.core.run_dir import RunDir
from dtrain.launching import slurm
from dtrain.launching.commands import quote, render
from dtrain.launching.container import IMAGE, MOUNTS, mounts_text, recipe_mounts

COMMENT = "dtrain:"  # what a job's comment begins with; the run folder follows
WARN_SECONDS = 300
CORES_A_GPU, MEMORY_A_GPU, CORES_WITHOUT_GPU, MEMORY_WITHOUT_GPU = 8, "64", 8, "32G"
_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "slurm", _PACKAGE.parent / "slurm")  # a wheel's; a checkout's
_PATTERNS = {
    "time": (r"[0-9][0-9:-]*", "minutes, HH:MM:SS or D-HH:MM:SS"),
    "partition": (r"[\w.,-]+", "names of partitions"),
    "account": (r"[\w.@+-]+", "the name of an account"),
    "qos": (r"[\w.-]+", "the name of a quality of service"),
    "memory": (r"[0-9]+[KMGT]?", "a size such as 500G"),
    "after": (r"[0-9]+(_[0-9]+)?", "the number of a job"),
    "preflight": ("on|off|exclude", "on, off or exclude"),
}


@dataclass(frozen=True)
class Resources:
    """Resources that a job requests.

    Attributes:
        gpus: on each node; 0 for a recipe that trains on CPUs.
        time: time limit, in Slurm's notation.
        after: id of a job that must succeed first.
        force: start although it does not fit by the plan.
    """

    nodes: int = 1
    gpus: int = 8
    time: str = "24:00:00"
    cores: int | None = None
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    after: str | None = None
    preflight: str = "on"
    force: bool = False

    def __post_init__(self) -> None:
        for name, (pattern, meaning) in _PATTERNS.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value, re.ASCII):
                raise UserError(f"{value!r} cannot be passed to Slurm", where=name, fix=meaning)

    @property
    def choices(self) -> dict[str, str]:
        """Options that are left out if unset."""
        named = {"partition": self.partition, "account": self.account, "qos": self.qos}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Submission:
    """A script and the command that submits it."""

    script: str
    path: Path
    command: list[str]

    def render(self) -> str:
        """The script and the command, as a person could type them."""
        command = " ".join(quote(word) for word in self.command)
        return f"{self.script}\n# submitted by:\n# " + command.replace("\n", "\n# ")


def training(recipe: Recipe, resources: Resources, working: Path) -> Submission:
    """The job that trains.

    Args:
        recipe: with an absolute run folder.
        resources: to request.
        working: the folder that the recipe's paths start from.

    Raises:
        UserError: a batch cannot be divided among the ranks, or Slurm cannot handle a path.
    """
    run = Path(recipe.output.folder)
    gpus = 0 if recipe.device == "cpu" else resources.gpus
    ranks = recipe.launch.ranks_on_node(gpus or 1)
    check_batches(recipe, resources.nodes * ranks)
    cores, memory = _share(resources, gpus)
    script = render(
        "job.sh.jinja",
        name=job_name(recipe.name),
        nodes=resources.nodes,
        gpus=gpus,
        cores=cores,
        memory=memory,
        time=resources.time,
        choices=resources.choices,
        warn_seconds=WARN_SECONDS,
        recipe=RunDir(run).submitted_recipe,
        environment=sys.prefix,
        preflight=resources.preflight,
        force=resources.force,
        shared=shared_script("job.sh"),
        **_container(recipe),
    )
    return _submission(script, run, "job", working, resources.after)


def preparation(recipe: Recipe, resources: Resources, working: Path) -> Submission:
    """The job that tokenizes and packs the data, on CPUs."""
    run = Path(recipe.output.folder)
    script = render(
        "prepare.sh.jinja",
        name=f"{job_name(recipe.name)}-data",
        cores=CORES_WITHOUT_GPU,
        memory=MEMORY_WITHOUT_GPU,
        time=resources.time,
        choices=resources.choices,
        environment=sys.prefix,
        recipe=RunDir(run).submitted_recipe,
        shared=shared_script("python.sh"),
        **_container(recipe),
    )
    return _submission(script, run, "prepare", working, resources.after)


def _container(recipe: Recipe) -> dict[str, str]:
    """The image that this shell's DTRAIN_CONTAINER names, and what the recipe needs in it."""
    image = os.environ.get(IMAGE, "")
    if "://" not in image and os.path.exists(image):
        image = os.path.abspath(image)
    more = os.environ.get(MOUNTS, "")
    return {"container": image, "mounts": mounts_text(recipe_mounts(recipe), more) if image else ""}


def _share(resources: Resources, gpus: int) -> tuple[int, str]:
    cores = resources.cores or gpus * CORES_A_GPU or CORES_WITHOUT_GPU
    memory = f"{gpus * int(MEMORY_A_GPU)}G" if gpus else MEMORY_WITHOUT_GPU
    return cores, resources.memory or memory


def _submission(script: str, run: Path, kind: str, working: Path, after: str | None) -> Submission:
    path, log = RunDir(run).job_script(kind), RunDir(run).job_log(kind)
    # Paths are separate arguments, because #SBATCH lines have their own quoting rules.
    command = ["sbatch", "--parsable", f"--chdir={working}", f"--output={log_pattern(log)}"]
    command += [f"--comment={COMMENT}{run}"]
    if after:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return Submission(script, path, [*command, str(path)])


def log_pattern(path: Path) -> str:
    """A path, escaped for sbatch's --output."""
    text = str(path)
    if "\\" in text:
        fix = "choose another output.folder"
        raise UserError("Slurm cannot write a log below a backslash", where=text, fix=fix)
    return text.replace("%", "%%")


def job_name(name: str) -> str:
    """A job name without special characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:64] or "dtrain"


def shared_script(name: str) -> Path:
    """A script of slurm/ that those of jobs source."""
    for folder in _FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name} is missing", where=str(_FOLDERS[0]), fix="install dtrain again")


def submit(recipe: Recipe, resources: Resources, working: Path, prepare: bool) -> list[str]:
    """Write the scripts into the run folder and submit them; return the jobs' ids.

    Raises:
        UserError: Slurm refuses, or another job uses this run folder.
    """
    run = Path(recipe.output.folder)
    check_no_other_job(run)
    write_atomic(RunDir(run).submitted_recipe, dump(recipe))
    jobs = []
    if prepare:
        first = preparation(recipe, resources, working)
        jobs.append(_send(first, run))
        resources = Resources(**{**vars(resources), "after": jobs[0]})
    try:
        jobs.append(_send(training(recipe, resources, working), run))
    except UserError:
        if jobs:
            slurm.cancel(jobs)
        raise
    return jobs


def check_no_other_job(run: Path) -> None:
    """Check that no other job uses the run folder.

    Raises:
        UserError: one is waiting or running.
    """
    queued = [job for job in slurm.queue() if job.comment == f"{COMMENT}{run}"]
    if queued:
        message = f"job {queued[0].job} is {queued[0].state} for this run folder"
        raise UserError(message, where=str(run), fix="dtrain cancel it, or choose another folder")
    RunDir(run).lock().release()


def _send(job: Submission, run: Path) -> str:
    write_atomic(job.path, job.script)
    slurm.ask([job.command[0], "--test-only", *job.command[1:]])
    number = slurm.ask(job.command).strip().split(";")[0]
    known = jobs_of(run)
    write_json(RunDir(run).jobs, [*known, {"job": number, "submitted": time.time()}])
    return number


class _Record(TypedDict):
    """A job in jobs.json."""

    job: JobId
    submitted: NotRequired[Seconds]


def jobs_of(run: Path) -> list[dict[str, object]]:
    """The jobs that were submitted for a run folder, oldest first.

    Raises:
        UserError: the record is damaged.
    """
    path = RunDir(run).jobs
    return list(read_json(path, list[_Record])) if path.exists() else []
