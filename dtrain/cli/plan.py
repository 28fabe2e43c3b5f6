"""`dtrain plan`: whether a recipe fits, how long it takes, and which engine is best."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress

GpuName = Annotated[str, typer.Option(help="GPU, for example h100-80g, a100-40g, rtx4090.")]
Nodes = Annotated[int, typer.Option(min=1, help="Number of nodes.")]
GpusPerNode = Annotated[
    int | None,
    typer.Option(min=1, help="GPUs per node; default: the recipe's launch.processes, else 8."),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Also simulate a step, which takes torch and a minute or two."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def plan(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    gpu: GpuName = "h100-80g",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Predict whether a recipe fits, how long it takes, and which engine is best; needs no GPU."""
    from dtrain.config.load import load_recipe
    from dtrain.planning.gpus import find_gpu
    from dtrain.planning.known_models import position_warnings
    from dtrain.planning.plan import as_json as plan_json
    from dtrain.planning.plan import make_plan, simulate_plan
    from dtrain.planning.render import render_plan
    from dtrain.planning.workload import Cluster

    settings = load_recipe(recipe, overrides or [])
    on_node = gpus_per_node or settings.launch.ranks_on_node(8)
    for line in position_warnings(settings):
        print(f"warning: {line}", file=sys.stderr)
    result = make_plan(settings, Cluster(find_gpu(gpu), nodes, on_node))
    if exact:
        result = simulate_plan(result, settings, no_progress if as_json else show_progress)
    if as_json:
        print(json.dumps(plan_json(result), indent=2))
        return
    for line in render_plan(result, shutil.get_terminal_size((100, 24)).columns):
        print(line)


@contextmanager
def show_progress(title: str, units: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal."""
    from dtrain.core.log import progress

    with progress(title, units) as bar:
        yield bar.advance


@contextmanager
def no_progress(title: str, units: int) -> Iterator[Callable[[int], None]]:
    """No progress bar, for output that a program reads."""
    yield lambda units: None
