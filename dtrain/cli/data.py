"""`dtrain data`: extract, show, prepare, scan, clean and augment training data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import Overrides, RecipeAddress, address, path
from dtrain.cli.augment import augment
from dtrain.cli.extract import extract
from dtrain.core.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from dtrain.config.schema import Recipe, Stage
    from dtrain.data_quality.scan_result import ScanResult

app = typer.Typer(
    help="Extract, show, prepare, scan, clean and augment training data.", no_args_is_help=True
)
app.command("augment")(augment)
app.command("extract")(extract)

Address = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|PATH", parser=address, help="A recipe, or a file or folder of rows."
    ),
]
StageName = Annotated[
    str | None,
    typer.Option("--stage", metavar="NAME", help="Stage of the recipe; default: the first."),
]


@app.callback()
def data() -> None:
    """Extract, show, prepare, scan, clean and augment training data."""


@app.command()
def show(
    address: Address,
    overrides: Overrides = None,
    stage: StageName = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Number of sequences or rows.")] = 3,
) -> None:
    """Print the first training sequences; tokens with loss are green.

    For a PATH: print its first rows as dtrain reads them.
    """
    from dtrain.core.log import console

    if is_recipe(address):
        from dtrain.config.load import load_recipe

        recipe = load_recipe(address, overrides or [])
        texts = _sequences_of_stage(recipe, chosen_stage(recipe, stage), count, console.is_terminal)
    else:
        texts = _rows_of_path(address, count)
    for text in texts:
        console.print(text, end="")


@app.command()
def prepare(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do share I of N; default: from the Slurm array."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokenizer processes; default: as many as cores and memory allow."
        ),
    ] = None,
) -> None:
    """Tokenize and pack all data of a recipe before training.

    Only what changed is prepared again, and an interrupted preparation resumes.

    Commands with --shard, or the tasks of a Slurm array, share the work.
    """
    import os

    from dtrain.config.load import load_recipe
    from dtrain.data.shards import parse_share, share_of_array
    from dtrain.pipeline.stage_inputs import prepare_recipe

    share = parse_share(shard) if shard else share_of_array(os.environ)
    prepare_recipe(load_recipe(recipe, overrides or []), share, processes)


@app.command()
def scan(
    address: Address,
    overrides: Overrides = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="Stage of the recipe; default: all."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", parser=address, help="Held-out rows to find leaks of, with a PATH."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=path, help="Write the report to this JSON file.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", parser=path, help="Write the report to this HTML page.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that check rows.")] = 2,
) -> None:
    """Report lengths, languages, duplicates, leaks, personal data and errors of rows.

    For a RECIPE: the rows of each stage, with its tokenizer, against its evaluation sets. Each
    stage of several has a report of its own: scan-task.html.
    """
    from dtrain.core.files import write_json
    from dtrain.core.log import console
    from dtrain.data_quality.report import build_report, terminal_report, write_html

    for name, result in _scans(address, overrides or [], stage, against or [], processes):
        report = build_report(result)
        if name:
            console.print(f"stage {name}")
        for block in terminal_report(report):
            console.print(block, soft_wrap=isinstance(block, str))
        if json_file:
            write_json(path := _of_stage(json_file, name), report)
            console.print(f"wrote {path}")
        if html_file:
            write_html(path := _of_stage(html_file, name), report, Path(address).name)
            console.print(f"wrote {path}")


@app.command()
def clean(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    stage: StageName = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", parser=path, help="Output folder.")
    ] = Path("cleaned"),
    processes: Annotated[int, typer.Option(min=1, help="Processes that check rows.")] = 2,
) -> None:
    """Write a stage's rows without those that `data.clean` drops or quarantines."""
    from dtrain.config.load import load_recipe
    from dtrain.data_quality.clean import ACTIONS, QUARANTINE_FILE
    from dtrain.data_quality.clean import clean as write_clean
    from dtrain.pipeline.data_inspection import scan_stage

    if out.exists():
        raise UserError("exists already", where=str(out), fix="choose another --out")
    settings = load_recipe(recipe, overrides or [])
    chosen = chosen_stage(settings, stage)
    summary = write_clean(scan_stage(settings, chosen, processes), chosen.data.clean, out)
    counts = dict(summary["counts"])
    for action in ACTIONS:
        print(f"{action:16} {counts.pop(action, 0):>10,}")
    if counts:
        print("reasons:", ", ".join(f"{reason} {number:,}" for reason, number in counts.items()))
    print(f"fingerprint {summary['fingerprint'][:16]}")
    print(f"removed rows, with reasons: {out / QUARANTINE_FILE}")
    print("replace the recipe's sources by these, with the weights that they had:")
    for name, source in summary["sources"].items():
        print(f"  - {{path: {out / name}}}  # {source}")


def _scans(
    address: str, overrides: list[str], stage: str | None, against: list[str], processes: int
) -> Iterator[tuple[str, ScanResult]]:
    """The scans of a path or of a recipe's stages, and the stage's name if there are several."""
    from dtrain.pipeline.data_inspection import scan_path, scan_stage

    if not is_recipe(address):
        yield "", scan_path(address, against, processes)
        return
    from dtrain.config.load import load_recipe

    recipe = load_recipe(address, overrides)
    stages = recipe.stages if stage is None else [chosen_stage(recipe, stage)]
    for each in stages:
        yield each.name if len(stages) > 1 else "", scan_stage(recipe, each, processes)


def _of_stage(path: Path, stage: str) -> Path:
    """The file of a stage's report: scan.html → scan-task.html; the path itself without a stage."""
    return path.with_stem(f"{path.stem}-{stage}") if stage else path


def _sequences_of_stage(recipe: Recipe, stage: Stage, count: int, color: bool) -> Iterator[Text]:
    from dtrain.data.show import sequences
    from dtrain.pipeline.data_inspection import stage_dataset

    dataset, tokenizer = stage_dataset(recipe, stage)
    yield from sequences(dataset, tokenizer, recipe.seed, count, color)


def _rows_of_path(path: str, count: int) -> Iterator[Text]:
    from dtrain.config.data import Source
    from dtrain.data.records import open_source
    from dtrain.data.show import render_records

    source = open_source(Source(path=path))
    yield from render_records(source.rows(), source.files, count)


def is_recipe(address: str) -> bool:
    """Whether the address is a recipe, not data."""
    from dtrain.recipes import shipped

    return Path(address).suffix in (".yaml", ".yml") or address in shipped()


def chosen_stage(recipe: Recipe, name: str | None) -> Stage:
    """The stage with this name; the first if the name is None.

    Raises:
        UserError: there is no such stage.
    """
    matching = [stage for stage in recipe.stages if name in (None, stage.name)]
    if not matching:
        names = ", ".join(stage.name for stage in recipe.stages)
        raise UserError("no such stage", where=f"--stage {name}", fix=f"one of {names}")
    if len(matching) > 1:
        line = f"stage {matching[0].name}, the first of {len(matching)}; --stage NAME chooses"
        print(line, file=sys.stderr)
    return matching[0]
