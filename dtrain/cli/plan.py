"""`dtrain plan`: whether a recipe fits, how long it takes, and which engine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress

GpuName = Annotated[str, typer.Option(help="For example h100-80g, a100-40g, rtx4090.")]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes.")]
GpusPerNode = Annotated[
    int | None, typer.Option(min=1, help="GPUs of each node; as the recipe's launch says, else 8.")
]
Exactly = Annotated[
    bool, typer.Option("--exact", help="Simulate a step as well; needs torch and a minute or two.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Plain values instead of a screen.")]


def plan(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    gpu: GpuName = "h100-80g",
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    exact: Exactly = False,
    as_json: AsJson = False,
) -> None:
    """Say whether it fits, how long it takes, and which engine is best; needs no GPU."""
    from dtrain.config.load import load_recipe
    from dtrain.planning.gpus import find_gpu
    from dtrain.planning.plan import as_json as plain
    from dtrain.planning.plan import make_plan, with_exact
    from dtrain.planning.positions import position_warnings
    from dtrain.planning.render import lines_of
    from dtrain.planning.workload import Cluster

    settings = load_recipe(recipe, overrides or [])
    on_node = gpus_per_node or settings.launch.ranks_on_node(8)
    for line in position_warnings(settings):
        print(f"warning: {line}", file=sys.stderr)
    made = make_plan(settings, Cluster(find_gpu(gpu), nodes, on_node))
    if exact:
        made = with_exact(made, settings, silent if as_json else shown)
    if as_json:
        print(json.dumps(plain(made), indent=2))
        return
    for line in lines_of(made, shutil.get_terminal_size((100, 24)).columns):
        print(line)


@contextmanager
def shown(title: str, units: int) -> Iterator[Callable[[int], None]]:
    """Progress on the screen."""
    from dtrain.core.log import progress

    with progress(title, units) as bar:
        yield bar.advance


@contextmanager
def silent(title: str, units: int) -> Iterator[Callable[[int], None]]:
    """No progress: what is printed is read by a program."""
    yield lambda done: None
