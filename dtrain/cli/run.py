"""`dtrain run`, `report` and `checkpoints`: a run and its results."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.arguments import Overrides, Price, RecipeAddress, path
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic
from dtrain.core.interrupts import INTERRUPTED_EARLY, end_on_interrupt, hold_interrupts
from dtrain.core.output import wrapped
from dtrain.core.process_limits import check_process_limits
from dtrain.core.run_dir import LOCKED_BY_LAUNCHER, RunDir, create_numbered
from dtrain.core.stage_dir import CHECKPOINTS
from dtrain.core.units import size
from dtrain.launching.commands import COMMAND, launcher_environment, torchrun_command

Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start again in a new folder next to the old one.")
]
AllowChange = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Resume although this key changed, such as train.steps or stages.task.train.steps; "
        "may be repeated.",
    ),
]


def run(
    recipe: RecipeAddress,
    overrides: Overrides = None,
    fresh: Fresh = False,
    allow_change: AllowChange = None,
) -> None:
    """Train on this machine; run it again to resume."""
    end_on_interrupt(INTERRUPTED_EARLY)  # before imports that take seconds
    from dtrain.config.load import dump, load_recipe, with_origins
    from dtrain.launching.commands import ranks_per_node, run_dir_of, with_run_dir
    from dtrain.pipeline.input_checks import check_inputs

    check_process_limits()
    settings = load_recipe(recipe, overrides or [])
    report = check_inputs(settings)
    report.errors = with_origins(report.errors, recipe, overrides or [])
    report.raise_errors()
    run_dir = run_dir_of(settings)
    if fresh:
        run_dir = create_numbered(run_dir.path)
    settings = with_run_dir(settings, run_dir)
    lock = run_dir.lock(fix="wait for it, choose another output.folder, or add --fresh")
    run_dir.request(dump(settings))
    command = torchrun_command(
        run_dir.start_recipe, ranks_per_node(settings, 0), allow_change or []
    )
    environment = launcher_environment(os.environ, settings.device)
    environment[COMMAND] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    environment[LOCKED_BY_LAUNCHER] = str(run_dir.path)
    lock.keep_after_exec()
    # Becoming torchrun leaves no process in between that could lose a signal or an exit status.
    sys.stdout.flush()
    hold_interrupts()
    os.execve(command[0], command, environment)


def report(
    run: Annotated[Path, typer.Argument(parser=path, help="A run folder.")], price: Price = None
) -> None:
    """Write RUN/report.html and print its path."""
    RunDir(run).check_exists()
    from dtrain.monitoring.report import write_report

    print(write_report(run, price))


Runs = Annotated[list[Path], typer.Argument(metavar="RUN RUN...", parser=path, help="Run folders.")]
Page = Annotated[
    Path | None, typer.Option("--html", parser=path, help="Also write a page with the curves.")
]


def compare(runs: Runs, page: Page = None) -> None:
    """Compare runs: held-out losses with their uncertainty, speed, and the keys that differ."""
    for run in runs:
        RunDir(run).check_exists()
    if len(runs) < 2:
        raise UserError("compare needs two runs", fix="dtrain compare runs/a runs/b")
    from dtrain.monitoring.compare import compare_runs, comparison_page, comparison_text

    comparison = compare_runs(runs)
    print(wrapped(comparison_text(comparison), sys.stdout))
    if page is not None:
        write_atomic(page, comparison_page(comparison))
        print(f"\n{page}")


COLUMNS = "{:<16} {:>8} {:>14} {:>10}  {:<9} {}"


def checkpoints(
    run: Annotated[Path, typer.Argument(parser=path, help="A run folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
) -> None:
    """List a run's checkpoints; with --verify, exit status 2 if one is damaged or incomplete."""
    RunDir(run).check_exists()
    from dtrain.checkpoints import list_checkpoints

    print(COLUMNS.format("stage", "step", "held-out loss", "size", "complete", "verified"))
    broken = 0
    for folder in sorted(run.glob(f"*/{CHECKPOINTS}"), key=lambda path: path.stat().st_ctime):
        for info in list_checkpoints(folder, verify=verify):
            loss = "-" if info.loss is None else f"{info.loss:.4f}"
            complete = "yes" if info.complete else "no"
            verified = {None: "-", True: "yes", False: "no"}[info.verified]
            row = (folder.parent.name, info.step, loss, size(info.size), complete, verified)
            print(COLUMNS.format(*row).rstrip())
            if info.problem:
                print(f"    {info.problem}")
            broken += verify and not info.verified
    raise typer.Exit(Exit.USER_ERROR if broken else Exit.FINISHED)
