"""Command lines and environments of the workers, and quoting for those written into scripts."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import compile_folder, user_path
from dtrain.core.errors import UserError
from dtrain.core.hardware import job_cores
from dtrain.core.run_dir import RunDir
from dtrain.launching.container import python_command, srun_options

WORKER = "dtrain.train"
LAUNCHER = "DTRAIN_LAUNCHER"  # variable: process id of the launcher, which no rank outlives
COMMAND = "DTRAIN_COMMAND"  # variable: the command that was typed or submitted, for the record
MAX_COMPILE_THREADS = 4  # Inductor itself starts one a core, up to 32, for each rank
# Torch's variable, by its current and former names.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_CHECKOUT = Path(__file__).parent.parent.parent


def torchrun_command(
    recipe_file: Path, processes: int | str, allow_change: Sequence[str] = ()
) -> list[str]:
    """Start the workers of one machine.

    Args:
        recipe_file: the resolved recipe.
        processes: ranks, or "auto": one a GPU, or one on a CPU.
        allow_change: keys that may differ from those of the run's first start.
    """
    command = [sys.executable, "-m", "dtrain.torchrun", "--nnodes=1"]
    command += [f"--nproc-per-node={processes}", "-m", WORKER, str(recipe_file)]
    for key in allow_change:
        command += ["--allow-change", key]
    return command


def launcher_environment(environ: Mapping[str, str], device: str) -> dict[str, str]:
    """The environment of `torchrun_command`.

    Args:
        environ: current variables.
        device: the recipe's.
    """
    variables = dict(environ)
    if Path.cwd() != _CHECKOUT:
        # `python -m` looks into the working folder first: a queue.py there must do no harm.
        variables.setdefault("PYTHONSAFEPATH", "1")
    if device == "cpu":
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def worker_environment(environ: Mapping[str, str], processes: int, has_gpu: bool) -> dict[str, str]:
    """Variables that the workers need, except those that `environ` sets.

    Args:
        environ: current variables.
        processes: ranks on this machine.
        has_gpu: whether this machine has a GPU.

    Raises:
        UserError: there is no folder for what is compiled.
    """
    compiled = compile_folder()
    cores_of_a_rank = max(1, job_cores() // processes)
    defaults = {
        "OMP_NUM_THREADS": str(cores_of_a_rank),
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(MAX_COMPILE_THREADS, cores_of_a_rank)),
        # On a shared file system, so that a requeued job starts warm.
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "TOKENIZERS_PARALLELISM": "false",
        # A rank that waits while another fails would report its lost connection.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not has_gpu:
        defaults["DS_ACCELERATOR"] = "cpu"
    elif not any(environ.get(name) for name in ALLOCATOR_SETTINGS):
        # Steps of many lengths otherwise leave gaps that no tensor fits into.
        defaults[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    return {name: value for name, value in defaults.items() if not environ.get(name)}


def sees_gpu() -> bool:
    """Whether this machine has a GPU that a driver serves, without asking torch."""
    devices = Path("/dev")
    return any(devices.glob("nvidia[0-9]*")) or any(
        (devices / name).exists() for name in ("kfd", "dxg")
    )


def step_command(
    arguments: Sequence[str],
    *,
    nodes: int,
    ranks: int | str,
    endpoint: str,
    cores: str | None,
    worker: str = WORKER,
) -> list[str]:
    """Start the workers on every node of a Slurm job, from its batch script.

    Args:
        arguments: of the worker; the resolved recipe for the one that trains.
        nodes: nodes of the job.
        ranks: processes on each node, or "auto": one a GPU.
        endpoint: host and port at which several nodes meet; on the first of them.
        cores: cores of a node; srun does not take them from sbatch by itself.
        worker: module that the ranks run.
    """
    command = ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}", f"--ntasks={nodes}"]
    command += [f"--cpus-per-task={cores}"] if cores else []
    command += [*srun_options(os.environ), *python_command(os.environ)]
    command += ["-m", "dtrain.torchrun", f"--nnodes={nodes}"]
    command += [f"--nproc-per-node={ranks}"]
    if nodes > 1:
        command += [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={secrets.token_hex(8)}"]
    return [*command, "-m", worker, *arguments]


def quote(value: object) -> str:
    """`value` as one word of bash that expands to exactly these characters.

    Raises:
        UserError: it contains a NUL, which no argument can.
    """
    text = str(value)
    if "\0" in text:
        raise UserError("a NUL character cannot be passed to a program", where=repr(text))
    return shlex.quote(text)


def render(template: str, **values: Any) -> str:
    """A script from a template of this package; every value is quoted."""
    environment = Environment(
        loader=PackageLoader("dtrain.launching", "."),
        undefined=StrictUndefined,
        finalize=quote,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def run_dir_of(recipe: Recipe) -> RunDir:
    """The recipe's run folder, by its absolute path."""
    return RunDir(user_path(recipe.output.folder).absolute())


def with_run_dir(recipe: Recipe, run: RunDir) -> Recipe:
    """The recipe with the path of its run folder."""
    output = recipe.output.model_copy(update={"folder": str(run.path)})
    return recipe.model_copy(update={"output": output})


def ranks_per_node(recipe: Recipe, gpus: int) -> int | str:
    """Processes on each node: the recipe's; for auto one a GPU of the node.

    Args:
        recipe: of the run.
        gpus: on a node; 0 leaves "auto" to the launcher, which counts them.
    """
    if recipe.launch.processes == "auto":
        return 1 if recipe.device == "cpu" else gpus or "auto"
    return recipe.launch.processes
