"""`dtrain recipes`, `check`, `schema` and `plan`: recipes, their errors, and what they need."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Annotated

import typer
from rich.text import Text

from dtrain.cli.arguments import Overrides, Price, RecipeAddress, path
from dtrain.cli.completion import shipped_names
from dtrain.core.errors import UserError
from dtrain.core.output import wrapped
from dtrain.recipes import FOLDER, shipped, summary

app = typer.Typer(help="List the shipped recipes, or copy one to edit.")


@app.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes, or copy one to edit."""
    if context.invoked_subcommand:
        return
    wide, columns = max(map(len, shipped())) + 2, min(100, shutil.get_terminal_size().columns)
    for name, file in shipped().items():
        print(fill(f"{name:<{wide}}{summary(file)}", columns, subsequent_indent=" " * wide))
    print("\ndtrain recipes copy NAME [PATH] copies one to edit")
    print(f"all keys: {FOLDER}/README.md")


@app.command()
def copy(
    name: Annotated[
        str, typer.Argument(help="Name of a shipped recipe.", autocompletion=shipped_names)
    ],
    path: Annotated[
        Path | None, typer.Argument(parser=path, help="Target; default: NAME.yaml.")
    ] = None,
) -> None:
    """Copy a shipped recipe to a new file."""
    known = shipped()
    if name not in known:
        fix = f"use one of {', '.join(known)}"
        raise UserError("no such shipped recipe", where=name, fix=fix)
    target = path or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(known[name].read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError("exists already", where=str(target), fix="choose another file") from error
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(target)) from error
    print(f"wrote {target}; edit it, then: dtrain run {target}")


def check(recipe: RecipeAddress, overrides: Overrides = None) -> None:
    """Print a recipe with all defaults, or all errors of its keys, data, base and adapters."""
    from dtrain.config.load import dump, load_recipe, with_origins
    from dtrain.evaluation.metric import unreachable
    from dtrain.pipeline.input_checks import NOT_CHECKED, check_inputs
    from dtrain.planning.known_models import position_warnings

    settings = load_recipe(recipe, overrides or [])
    report = check_inputs(settings)
    if not report.errors:
        print(dump(settings), end="", flush=True)
    for line in report.notes:  # below the recipe, which fills several screens
        print(wrapped(line, sys.stderr), file=sys.stderr)
    report.errors = with_origins(report.errors, recipe, overrides or [])
    report.raise_errors()
    for line in (*position_warnings(settings), *unreachable(settings)):
        print(wrapped(f"warning: {line}", sys.stderr), file=sys.stderr)
    print(wrapped(f"no errors; {NOT_CHECKED}", sys.stderr), file=sys.stderr)


def schema() -> None:
    """Print the JSON Schema of recipes, for the completion of an editor."""
    from dtrain.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


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
    price: Price = None,
    exact: Exact = False,
    as_json: AsJson = False,
) -> None:
    """Predict whether a recipe fits, how long it takes, and which engine is best; needs no GPU."""
    from dtrain.config.load import load_recipe
    from dtrain.core.log import console
    from dtrain.planning.gpus import find_gpu
    from dtrain.planning.known_models import position_warnings
    from dtrain.planning.plan import as_json as plan_json
    from dtrain.planning.plan import make_plan, simulate_plan
    from dtrain.planning.render import render_plan
    from dtrain.planning.workload import Cluster

    settings = load_recipe(recipe, overrides or [])
    on_node = gpus_per_node or settings.launch.ranks_on_node(8)
    for line in position_warnings(settings):
        print(wrapped(f"warning: {line}", sys.stderr), file=sys.stderr)
    if settings.device == "cpu":
        line = f"device: cpu is in the recipe; this plan is for a {gpu}, and not for CPUs"
        print(wrapped(line, sys.stderr), file=sys.stderr)
    result = make_plan(settings, Cluster(find_gpu(gpu), nodes, on_node))
    if exact:
        result = simulate_plan(result, settings, no_progress if as_json else show_progress)
    if as_json:
        print(json.dumps(plan_json(result, price), indent=2))
        return
    for line in render_plan(result, shutil.get_terminal_size((100, 24)).columns, price):
        console.print(styled(line))


def styled(line: str) -> Text:
    """A line of the plan with its verdict in color, and headings in bold."""
    text = Text(line, style="bold" if line and not line.startswith(" ") else "")
    for verdict, color in (("FITS", "green"), ("TIGHT", "yellow"), ("DOES NOT FIT", "red")):
        text.highlight_words([verdict], color)
    return text


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
