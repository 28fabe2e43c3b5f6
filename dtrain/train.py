"""The worker that every launcher starts: `torchrun -m dtrain.train RECIPE [key=value …]`."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from dtrain.config.load import dump, load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic, write_json
from dtrain.core.log import is_first_rank, say
from dtrain.distributed.watch import Watch
from dtrain.distributed.world import end_world, start_world
from dtrain.launching.detect import resolve_engine
from dtrain.pipeline.chain import run_chain
from dtrain.pipeline.inputs import prepare_inputs
from dtrain.pipeline.run_folder import lock_run
from dtrain.stages.stop import StopFlag

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str] | None = None) -> int:
    """Run the recipe on this rank; return the exit status."""
    arguments = parse(argv)
    keep_libraries_quiet()
    die_with_launcher()
    run: Path | None = None
    try:
        recipe = resolved(load_recipe(arguments.recipe, arguments.overrides))
        run = Path(recipe.output.folder)
        finished = train(recipe, run, set(arguments.allow_change))
        status = Exit.FINISHED if finished else Exit.GO_ON
        reason = "" if finished else "asked to stop; start it again to go on"
        return end(run, status, reason)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return end(run, error.status, str(error))
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory: {error}", file=sys.stderr)
        return end(run, Exit.OUT_OF_MEMORY, str(error))
    except Exception:
        traceback.print_exc()
        return end(run, Exit.CRASHED, traceback.format_exc(limit=-1))


def keep_libraries_quiet() -> None:
    """Their warnings are about code that a user of dtrain did not write."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    disable_progress_bar()
    for name in ("bitsandbytes", "DeepSpeed", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def die_with_launcher() -> None:
    """Let the kernel kill this rank when torchrun is killed.

    Orphans would train on, and keep the run folder from the restart that is to go on.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the worker."""
    parser = argparse.ArgumentParser(prog="dtrain.train", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY")
    return parser.parse_args(argv)


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with what only the launcher knows."""
    kind = resolve_engine(recipe.engine.kind, os.environ)
    folder = str(Path(recipe.output.folder).expanduser().absolute())
    return recipe.model_copy(
        update={
            "engine": recipe.engine.model_copy(update={"kind": kind}),
            "output": recipe.output.model_copy(update={"folder": folder}),
        }
    )


def train(recipe: Recipe, run: Path, allowed: set[str]) -> bool:
    """Prepare, join the other ranks, run the chain."""
    lock = lock_run(run) if is_first_rank() else None
    if lock:
        write_atomic(run / "recipe.yaml", dump(recipe))
    world = start_world(recipe.device)
    inputs = world.first_then_others(lambda: prepare_inputs(recipe))
    # Until here a signal ends the process at once: what was prepared so far is kept anyhow.
    stop = StopFlag(run, looks_at_file=world.is_first)
    stop.listen()
    watch = Watch(run / ".watch", world.rank, world.size, lambda text: report_hang(run, text))
    watch.start()
    try:
        return run_chain(recipe, inputs, world, stop, watch, allowed)
    finally:
        watch.stop()
        end_world()
        if lock:
            lock.release()


def report_hang(run: Path, text: str) -> None:
    """Leave word of a hang before the process ends."""
    print(f"error: {text}", file=sys.stderr)
    end(run, Exit.HANG, text)


def end(run: Path | None, status: Exit, reason: str) -> int:
    """Leave outcome.json for a job script; the failing rank writes too, since it alone knows."""
    failed = status not in (Exit.FINISHED, Exit.GO_ON)
    if run is not None and run.is_dir() and (failed or is_first_rank()):
        outcome = "failed" if failed else {0: "finished", 75: "stopped-to-go-on"}[status]
        write_json(
            run / "outcome.json",
            {"outcome": outcome, "status": int(status), "reason": reason.strip()},
        )
    if failed:
        say(f"ended with status {int(status)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
