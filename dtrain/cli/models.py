"""`dtrain adapters`, `combine`, `diff`, `verify` and `model`: operations on models and adapters."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import path
from dtrain.core.errors import Exit
from dtrain.core.output import wrapped
from dtrain.core.units import count, size


def adapters(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FOLDER", parser=path, help="A run folder, or a folder with adapters."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List adapters: their stage, method, rank, layers, size and base."""
    from dtrain.serving.adapter_list import format_table, list_adapters

    adapters = list_adapters(folder)
    if as_json:
        print(json.dumps([adapter.as_json() for adapter in adapters], indent=2))
    elif adapters:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(format_table(adapters, columns))
    else:
        print("no adapters")


def combine(
    first: Annotated[Path, typer.Argument(metavar="A", parser=path, help="An adapter.")],
    second: Annotated[
        Path,
        typer.Argument(
            metavar="B", parser=path, help="An adapter of the same base, or trained after A."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=path, help="A new folder.")],
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Truncate to this rank and print the error (default: exact)."),
    ] = None,
) -> None:
    """Combine two adapters into one with the effect of both, to serve them without a merge."""
    from dtrain.core.units import size
    from dtrain.merge.combine_adapters import combine_adapters

    result = combine_adapters(first, second, out, rank=rank)
    error = "exact" if rank is None else f"relative error {result.error:.2e}"
    bytes_written = size(result.size_bytes)
    print(f"{out}: rank {result.rank}, {error}, {bytes_written}, of base {result.base}")


ROW = "{:>9} {:>10} {:>10} {:>10}  {}"


def diff(
    old: Annotated[Path, typer.Argument(parser=path, help="Folder of a model or an adapter.")],
    new: Annotated[Path, typer.Argument(parser=path, help="Folder of the one to compare with it.")],
    top: Annotated[int, typer.Option(min=0, help="Number of tensors to list; 0: all.")] = 20,
    json_file: Annotated[
        Path | None, typer.Option("--json", parser=path, help="Write all changes to this file.")
    ] = None,
) -> None:
    """List the tensors that differ, the largest relative change first."""
    from dtrain.core.files import write_json
    from dtrain.merge.diff import diff_models

    result = diff_models(old, new)
    if result.changes:
        print(ROW.format("relative", "|new-old|", "|old|", "greatest", "tensor"))
    for change in result.changes[: top or None]:
        values = (change.relative, change.difference_norm, change.old_norm, change.greatest)
        print(ROW.format(*(f"{x:.3g}" for x in values), f"{change.name} {list(change.shape)}"))
    if top and len(result.changes) > top:
        print(f"{'…':>9} {len(result.changes) - top} more (--top 0 lists all)")
    for sentence in result.incomparable:
        print(sentence)
    summary = (
        f"{len(result.changes)} tensors changed ({count(result.changed_elements)} elements, "
        f"relative change {result.relative:.3g}), {result.equal} are equal, "
        f"{len(result.incomparable)} cannot be compared"
    )
    print(wrapped(summary, sys.stdout))
    if json_file:
        write_json(json_file, result.as_json())


def verify(
    model: Annotated[Path, typer.Argument(parser=path, help="Folder of a model or an adapter.")],
) -> None:
    """Check a model's hashes, and look for NaN and infinity; exit status 2 if there is a problem.

    A model that dtrain did not write has no hashes: only its values are checked.
    """
    from dtrain.merge.verify import verify_model

    report = verify_model(model)
    for problem in report.problems:
        print(problem)
    hashed = f"{report.hashed} files hashed" if report.hashed else "no merge.json, no hash checked"
    result = f"{len(report.problems)} problems" if report.problems else "all finite"
    print(f"{model}: {report.tensors} tensors, {size(report.bytes)}, {hashed}, {result}")
    raise typer.Exit(Exit.USER_ERROR if report.problems else Exit.FINISHED)


app = typer.Typer(help="Models of the hub, and sample models and data.", no_args_is_help=True)


@app.callback()
def model() -> None:
    """Models of the hub, and sample models and data."""


@app.command()
def fetch(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ID|RECIPE|SAMPLE",
            help="A hub id, a recipe (its base and teachers), or a sample such as smollm2-135m.",
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id; default: main.")
    ] = None,
) -> None:
    """Download models into the hub client's cache, or build a sample; print their folders.

    Run it again to continue an interrupted download. HF_TOKEN opens gated and private models,
    HF_HOME is the cache, HF_ENDPOINT another hub.
    """
    from dtrain.cli.data import is_recipe
    from dtrain.config.load import load_recipe

    models = [("model fetch", name, revision)]
    if is_recipe(name):
        models = [*load_recipe(name).models]
    for key, address, version in models:
        print(fetch_model(key, address, version))


def fetch_model(key: str, address: str, revision: str | None) -> Path:
    """The folder of a model, which is downloaded or built first.

    Args:
        key: of the recipe, for errors.
        revision: of a hub id.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    from dtrain.core.cache_paths import hub_id, sample_name
    from dtrain.samples import ensure
    from dtrain.samples.make import SAMPLES

    if sample := address if address in SAMPLES else sample_name(address):
        return ensure(sample)
    from dtrain.models import hub

    if hub_id(address):
        return hub.download(address, key, revision)
    return hub.base_folder(address, key)
