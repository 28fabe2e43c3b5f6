"""`dtrain init`: a first recipe for a base, data and GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.import_config import check_written, write_new
from dtrain.core.errors import UserError
from dtrain.core.output import wrapped
from dtrain.core.run_dir import RECIPE

if TYPE_CHECKING:
    from dtrain.pipeline.data_survey import DataSurvey
    from dtrain.pipeline.recipe_draft import Hardware

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The new file.")]
Base = Annotated[str | None, typer.Option(help="Folder, hub id or sample of the base model.")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="File, folder or glob of texts or rows; may be repeated."),
]
GpuName = Annotated[
    str | None,
    typer.Option(help="GPU, for example h100-80g; cpu for none; default: this machine's."),
]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes.")]
Gpus = Annotated[int | None, typer.Option(min=1, help="GPUs of each node.")]


def init(
    out: Out = Path(RECIPE),
    base: Base = None,
    data: Data = None,
    gpu: GpuName = None,
    nodes: Nodes = 1,
    gpus: Gpus = None,
) -> None:
    """Write a first recipe, with a reason for each choice; on a terminal, ask for what is missing.

    Texts become a stage of continued pretraining, conversations one of fine-tuning, pairs and
    ratings one of preferences. The plan chooses LoRA or QLoRA, and the engine.
    """
    from dtrain.pipeline.data_survey import survey_data
    from dtrain.pipeline.recipe_draft import draft_recipe, recipe_name, recipe_text

    if out.exists():
        raise UserError("exists already", where=str(out), fix="choose another file")
    base = base or ask("base", "Base model (folder, hub id or dtrain:smollm2-135m to try)")
    read = {path: survey_data(path) for path in data} if data else ask_data()
    surveys = [survey for found in read.values() for survey in found]
    hardware = find_hardware(gpu, nodes, gpus)
    draft = draft_recipe(recipe_name(list(read)), base, surveys, hardware)
    write_new(out, recipe_text(draft))
    cluster = hardware.cluster
    options = f" --gpu {cluster.gpu.name} --nodes {nodes}" if cluster else ""
    print(f"wrote {out}; next:")
    for command in (f"check {out}", f"data scan {out}", f"plan {out}{options}", f"run {out}"):
        print(f"  dtrain {command}")
    raise typer.Exit(check_written(out))


def ask(option: str, question: str, default: str | None = None) -> str:
    """The answer of a person at the terminal.

    Raises:
        UserError: there is no terminal.
    """
    if not sys.stdin.isatty():
        raise UserError("is missing", where=f"--{option}", fix="dtrain init --help")
    answer: str = typer.prompt(question, default=default, show_default=bool(default))
    return answer.strip()


def ask_data() -> dict[str, list[DataSurvey]]:
    """Ask for paths until an empty answer, and again for one that cannot be read."""
    from dtrain.pipeline.data_survey import survey_data

    read: dict[str, list[DataSurvey]] = {}
    while True:
        question = "More data (Enter: no more)" if read else "Data (file, folder or glob)"
        path = ask("data", question, default="" if read else None)
        if not path:
            return read
        try:
            read[path] = survey_data(path)
        except UserError as error:
            print(wrapped(str(error), sys.stderr), file=sys.stderr)


def find_hardware(gpu: str | None, nodes: int, gpus: int | None) -> Hardware:
    """The GPUs to train on: those that are named, else those of this machine, else none.

    Raises:
        UserError: the plan does not know the GPU.
    """
    from dtrain.core import hardware
    from dtrain.pipeline.recipe_draft import Hardware
    from dtrain.planning.gpus import find_gpu, gpu_of_device
    from dtrain.planning.workload import Cluster

    rows = [] if gpu else hardware.gpus() or []
    here = [row for row in rows if "name" in row and "memory.total" in row]
    if here:
        mib = int(float(here[0]["memory.total"]))
        return Hardware(
            Cluster(gpu_of_device(here[0]["name"], mib << 20), nodes, gpus or len(here))
        )
    if gpu is None:
        question = "GPU to train on, such as h100-80g (cpu: none)"
        gpu = ask("gpu", question, default="cpu") if sys.stdin.isatty() else "cpu"
    if gpu == "cpu":
        return Hardware(None)
    return Hardware(Cluster(find_gpu(gpu), nodes, gpus or 1))
