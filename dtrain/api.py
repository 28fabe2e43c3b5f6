"""dtrain from Python: load or build a recipe, plan it, run it here or submit it, read its metrics.

A recipe is a `Recipe`, a file, the name of a shipped recipe, or its values as a dict. A run is a
separate process, as with the command `dtrain`; it leaves nothing behind in this one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.config.load import dump, load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic
from dtrain.core.processes import die_with_parent
from dtrain.core.run_dir import RECIPE, RunDir, create_numbered
from dtrain.launching.commands import launcher_environment, run_dir_of, with_run_dir
from dtrain.monitoring.run_record import read_run
from dtrain.monitoring.run_state import RunState, read_state
from dtrain.pipeline.input_checks import check_inputs
from dtrain.planning.gpus import find_gpu
from dtrain.planning.plan import RecipePlan, make_plan
from dtrain.planning.workload import Cluster

__all__ = ["Recipe", "Run", "UserError", "load_recipe", "plan", "run", "submit"]

RecipeLike = Recipe | str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run folder, while the run works and afterwards.

    Attributes:
        folder: its absolute path.
    """

    folder: Path

    @property
    def state(self) -> RunState:
        """What it is doing: the state, each stage's step, loss and time left.

        Raises:
            UserError: it has not started.
        """
        return read_state(self.folder)

    @property
    def model(self) -> Path | None:
        """Folder of the last merged model; None if there is none yet."""
        merged = read_run(self.folder).merged
        return self.folder / merged if merged else None

    def metrics(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The metrics as a table, for example for `pandas.DataFrame(run.metrics())`.

        Args:
            stage: of this stage only.

        Returns:
            A row for each step and for each evaluation, with `stage` and `step`; `loss` is the
            mean of the step's targets, in nats.
        """
        by_stage = read_run(self.folder).metrics
        names = list(by_stage) if stage is None else [stage]
        return [{"stage": name, **row} for name in names for row in by_stage.get(name, [])]

    def losses(self) -> list[dict[str, Any]]:
        """The held-out losses as a table: a row for each evaluation set and model."""
        return [
            {"set": losses.name, "model": model, "loss": loss}
            for losses in read_run(self.folder).losses
            for model, loss in losses.values.items()
        ]


def plan(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    gpu: str = "h100-80g",
    nodes: int = 1,
    gpus_per_node: int | None = None,
) -> RecipePlan:
    """Predict memory and time of a recipe; needs neither a GPU nor torch.

    Args:
        recipe: see above.
        overrides: `key=value`.
        gpu: its name, such as `a100-40g`.
        nodes: of the job.
        gpus_per_node: default: the recipe's launch.processes, else 8.

    Raises:
        UserError: the recipe is wrong, or the GPU or the base is not known.
    """
    settings = _load(recipe, overrides)
    on_node = gpus_per_node or settings.launch.ranks_on_node(8)
    return make_plan(settings, Cluster(find_gpu(gpu), nodes, on_node))


def run(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    allow_change: Sequence[str] = (),
) -> Run:
    """Train on this machine and wait for the end; the same call resumes an interrupted run.

    What the run prints is printed here. An interrupt (Ctrl-C, or that of a notebook) makes it save
    before it ends.

    Args:
        recipe: see above.
        overrides: `key=value`.
        fresh: start in a new folder next to an old one.
        allow_change: keys that may differ from those of the run's first start.

    Raises:
        UserError: the recipe is wrong, or the run failed; `status` says how.
        KeyboardInterrupt: it was interrupted, and has saved.
    """
    settings = _load(recipe, overrides)
    check_inputs(settings).raise_errors()
    folder = run_dir_of(settings)
    if fresh:
        folder = create_numbered(folder.path)
    settings = with_run_dir(settings, folder)
    options = [word for key in allow_change for word in ("--allow-change", key)]
    with _recipe_file(settings) as file:
        status, lines = _dtrain(["run", str(file), *options], settings.device)
    if status != Exit.FINISHED:
        raise _failure(status, lines, folder)
    return Run(folder.path)


def submit(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    nodes: int = 1,
    gpus: int = 8,
    time: str = "24:00:00",
    **options: str | int | bool,
) -> Run:
    """Check a recipe and submit it to Slurm, as `dtrain submit` does; return at once.

    Args:
        recipe: see above.
        overrides: `key=value`.
        nodes: of the job.
        gpus: of each node.
        time: longest run.
        options: more of `dtrain submit --help`, such as partition="gpu" or prepare=True.

    Raises:
        UserError: the recipe is wrong, does not fit, or Slurm refuses it.
    """
    settings = _load(recipe, overrides)
    if not options.get("force"):
        check_inputs(settings).raise_errors()
    folder = run_dir_of(settings)
    words = [f"--nodes={nodes}", f"--gpus={gpus}", f"--time={time}"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        words += ([option] if value else []) if isinstance(value, bool) else [f"{option}={value}"]
    with _recipe_file(with_run_dir(settings, folder)) as file:
        status, lines = _dtrain(["submit", str(file), *words], settings.device)
    if status != Exit.FINISHED:
        raise _failure(status, lines, folder)
    return Run(folder.path)


def _load(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    """The recipe with all its checks, which building a `Recipe` in code leaves out."""
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="python", exclude_none=True)
    return load_recipe(str(recipe) if isinstance(recipe, Path) else recipe, overrides)


@contextmanager
def _recipe_file(recipe: Recipe) -> Iterator[Path]:
    """A file with the recipe, for a command."""
    with tempfile.TemporaryDirectory(prefix="dtrain-") as folder:
        file = Path(folder) / RECIPE
        write_atomic(file, dump(recipe))
        yield file


def _dtrain(arguments: Sequence[str], device: str) -> tuple[int, list[str]]:
    """Run the command `dtrain`, and print its output here: a notebook shows only sys.stdout.

    Returns:
        Its exit status, and the lines that it printed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "dtrain", *arguments],
        env=launcher_environment(os.environ, device),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on
        preexec_fn=die_with_parent,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        _print_all(process.stdout, lines)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        _print_all(process.stdout, lines)
        process.wait()
        raise
    return process.wait(), lines


def _print_all(stream: Iterator[str], lines: list[str]) -> None:
    for line in stream:
        print(line, end="", flush=True)
        lines.append(line)


def _failure(status: int, lines: list[str], folder: RunDir) -> UserError:
    """The error of a command, which has printed it."""
    text = "".join(lines)
    _, found, message = text.rpartition("error: ")
    message = message.strip() if found else f"ended with status {status}"
    known = status if status in list(Exit) else Exit.CRASHED
    return UserError(message, where=str(folder.path), status=Exit(known))
