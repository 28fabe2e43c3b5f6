"""The `dtrain` command: its subcommands, and the exit status of errors."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

from dtrain.cli import (
    chat,
    data,
    import_config,
    init,
    jobs,
    merge,
    models,
    publish,
    recipes,
    run,
    sweep,
    watch,
)
from dtrain.cli.examples import add_examples
from dtrain.core.errors import Exit, UserError, first_line
from dtrain.core.lazy_import import LazyModule
from dtrain.core.os_errors import explained_os_errors
from dtrain.core.output import lost_output, protect_output, wrapped
from dtrain.core.ownership import keep_private

out_of_memory: Any = LazyModule("dtrain.distributed.out_of_memory")

app = typer.Typer(
    name="dtrain",
    help="Fine-tune language models in stages, on one machine or on a GPU cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("run")(run.run)
app.command("check")(recipes.check)
app.command("plan")(recipes.plan)
app.command("init")(init.init)
app.command("import")(import_config.import_config)
app.command("schema")(recipes.schema)
app.command("report")(run.report)
app.command("compare")(run.compare)
app.command("sweep")(sweep.sweep)
app.command("watch")(watch.watch)
app.command("checkpoints")(run.checkpoints)
app.command("merge")(merge.merge)
app.command("verify")(models.verify)
app.command("diff")(models.diff)
app.command("adapters")(models.adapters)
app.command("combine")(models.combine)
app.command("push")(publish.push)
app.command("export")(publish.export)
app.command("serve")(chat.serve)
app.command("chat")(chat.chat)
app.command("generate")(chat.generate)
app.command("submit")(jobs.submit)
app.command("jobs")(jobs.jobs)
app.command("status")(jobs.status)
app.command("logs")(jobs.logs)
app.command("cancel")(jobs.cancel)
app.command("preflight")(jobs.preflight)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.add_typer(models.app, name="model")
add_examples(app)


def print_version(asked: bool) -> None:
    """Print the versions that a report of a fault needs, and end."""
    if not asked:
        return
    from dtrain.monitoring.starts import software_versions

    versions = software_versions()
    commit = f" (commit {versions['commit']})" if "commit" in versions else ""
    print(
        f"dtrain {versions['dtrain']}{commit}, Python {versions['python']}, "
        f"torch {versions.get('torch', 'not installed')}"
    )
    raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=print_version,
        is_eager=True,
        help="Print the versions of dtrain, Python and torch.",
    ),
]


@app.callback()
def root(version: Version = False) -> None:
    """Fine-tune language models in stages, on one machine or on a GPU cluster."""


def main() -> int:
    """Run the command line and return its exit status."""
    protect_output()
    keep_private()
    status = _run()
    if (error := lost_output()) is not None and status == Exit.FINISHED:
        print(f"error: the output could not be written: {error.strerror}", file=sys.stderr)
        return Exit.USER_ERROR
    return status


def _is_out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # whose errors are of general types
        return isinstance(error, MemoryError)
    return bool(out_of_memory.is_out_of_memory(error))


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        message = "the working folder was removed"
        raise UserError(message, fix="cd to a folder that exists") from error


def _run() -> int:
    try:
        with explained_os_errors():
            _check_working_folder()
            app()
    except UserError as error:
        print(wrapped(f"error: {error}", sys.stderr), file=sys.stderr)
        return error.status
    except SystemExit as end:  # typer's way to return
        return end.code if isinstance(end.code, int) else Exit.FINISHED
    except Exception as error:
        if _is_out_of_memory(error):
            fix = "close other programs, or use a machine with more"
            print(f"error: the memory ran out: {first_line(error)}\n    → {fix}", file=sys.stderr)
            return Exit.OUT_OF_MEMORY
        traceback.print_exc()
        return Exit.CRASHED
    return Exit.FINISHED
