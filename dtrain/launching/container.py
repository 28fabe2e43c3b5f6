"""The steps of a job whose DTRAIN_CONTAINER names an image: each process starts in it.

slurm/container.sh, which job.sh sources, starts the supervisor in the same image, chooses between
pyxis (options of srun) and apptainer (a program that srun starts), and exports what is read here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError

IMAGE = "DTRAIN_CONTAINER"
RUNTIME = "DTRAIN_CONTAINER_RUNTIME"  # pyxis, or the path of apptainer; container.sh sets it
MOUNTS = "DTRAIN_CONTAINER_MOUNTS"  # SOURCE:TARGET,…


def srun_options(environ: Mapping[str, str]) -> list[str]:
    """Options by which srun starts a step in the container of the job, if pyxis runs it.

    Raises:
        UserError: an image is named, but the job was not started by a script that uses it.
    """
    image, runtime = environ.get(IMAGE), environ.get(RUNTIME)
    if image and not runtime:
        fix = "start the job with sbatch or dtrain submit, or unset it"
        raise UserError("only scripts of slurm/ start jobs in a container", where=IMAGE, fix=fix)
    if not image or runtime != "pyxis":
        return []
    mounts = f"--container-mounts={environ.get(MOUNTS, '')}"
    return [f"--container-image={image}", mounts, f"--container-workdir={Path.cwd()}"]


def python_command(environ: Mapping[str, str]) -> list[str]:
    """The beginning of a step's command: this Python, in the container if apptainer runs it."""
    image, runtime = environ.get(IMAGE), environ.get(RUNTIME)
    if not image or not runtime or runtime == "pyxis":
        return [sys.executable]
    # The supervisor's own mounts, which apptainer puts into its environment, are not on every node.
    command = ["env", "--unset=APPTAINER_BIND", "--unset=SINGULARITY_BIND", runtime, "exec", "--nv"]
    command += ["--bind", environ.get(MOUNTS, ""), "--pwd", str(Path.cwd())]
    return [*command, image, sys.executable]


def recipe_mounts(recipe: Recipe) -> list[Path]:
    """Folders that a run needs in its container: its own, and those of base and data.

    Working folder and caches are mounted by container.sh.
    """
    sets = [*(stage.data for stage in recipe.stages), *recipe.evaluation.sets.values()]
    addresses = [recipe.model.base, *(s.path for data in sets for s in data.all_sources)]
    folders = [Path(recipe.output.folder)]
    for address in addresses:
        path = local_path(address)
        while path.is_absolute() and not path.is_dir():  # of a file or a glob
            path = path.parent
        if path.is_absolute() and path != Path(path.anchor):
            folders.append(path)
    return list(dict.fromkeys(folders))


def mounts_text(folders: list[Path], more: str) -> str:
    """Folders as container.sh takes them, each under its own path.

    Args:
        more: what the user mounts.

    Raises:
        UserError: a path has a comma or a colon.
    """
    for folder in folders:
        if {",", ":"} & set(str(folder)):
            message = "a path with a comma or a colon cannot be mounted into a container"
            raise UserError(message, where=str(folder), fix="use another path")
    return ",".join([*(f"{folder}:{folder}" for folder in folders), *filter(None, [more])])
