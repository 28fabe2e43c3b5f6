"""The worker that every launcher starts: `torchrun -m dtrain.train RECIPE [key=value …]`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from dtrain.core.interrupts import INTERRUPTED_EARLY, end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()  # of a launcher, whose ranks are still importing

from dtrain.core.errors import Exit, UserError
from dtrain.core.lazy_import import import_fast
from dtrain.core.output import protect_output
from dtrain.core.ownership import keep_private
from dtrain.core.process_limits import check_process_limits
from dtrain.core.processes import (
    die_with_parent,
    exit_at_once,
)
from dtrain.launching.commands import LAUNCHER, sees_gpu, worker_environment


def main(argv: list[str] | None = None) -> int:
    """Run the recipe on this rank; return the exit status."""
    arguments = parse(argv)
    die_with_launcher()
    check_process_limits()
    status: int = import_fast("dtrain.rank_main").work(arguments)
    return status


def run() -> NoReturn:
    """Be the worker, whatever started it; end with its status."""
    protect_output()
    keep_private()
    # A signal that comes before the trainer listens ends the rank.
    is_first = os.environ.get("RANK", "0") == "0"
    end_on_interrupt(INTERRUPTED_EARLY if is_first and LAUNCHER not in os.environ else "")
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    try:
        os.environ.update(worker_environment(os.environ, int(ranks_here), sees_gpu()))
        status = main()
    except UserError as error:  # before the recipe is read
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        status = error.status
    if status not in (Exit.FINISHED, Exit.INTERRUPTED):
        # Python's own end would run destructors of libraries, which wait for the other ranks.
        exit_at_once(status)
    sys.exit(status)


def die_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun is killed.

    Orphans would continue to train, and hold the run folder against the restart.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
        parent = str(os.getppid())
        if parent != os.environ.get(LAUNCHER, parent):
            sys.exit(Exit.CRASHED)  # it was killed before this rank could ask for that


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the worker."""
    parser = argparse.ArgumentParser(prog="dtrain.train", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run()
