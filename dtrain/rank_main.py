"""One rank of a run, from the recipe to the exit status."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import traceback
import warnings
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from dtrain.checkpoints.identity import check_changeable
from dtrain.config.load import dump, load_recipe
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import local_path, user_path
from dtrain.core.errors import Exit, UserError
from dtrain.core.log import is_first_rank, say
from dtrain.core.os_errors import explained_os_errors
from dtrain.core.run_dir import RunDir, remove_partial_files
from dtrain.distributed.hang_watchdog import (
    MIN_LIMIT_SECONDS,
    MIN_LIMIT_SECONDS_GPU_OR_NODES,
    HangWatchdog,
    follow_compilations,
)
from dtrain.distributed.out_of_memory import is_out_of_memory
from dtrain.distributed.world import World, end_world, start_world
from dtrain.launching.accelerate_env import launcher_engine, resolve_engine
from dtrain.pipeline.auto_settings import without_choice
from dtrain.pipeline.exit_report import ExitReport
from dtrain.pipeline.memory_advice import out_of_memory_text
from dtrain.pipeline.runner import run_chain
from dtrain.pipeline.stage_inputs import (
    check_same_on_all_ranks,
    limit_micro_batches,
    prepare_inputs,
)
from dtrain.training.preemption import StopFlag


def work(arguments: argparse.Namespace) -> int:
    """Run the recipe on this rank; return the exit status.

    Args:
        arguments: recipe, overrides and allow_change, from the command line.
    """
    keep_libraries_quiet()
    report, recipe = ExitReport(), None
    try:
        with explained_os_errors():
            recipe = resolve(load_recipe(arguments.recipe, arguments.overrides))
            finished = train(recipe, set(arguments.allow_change), report)
    except UserError as error:
        return report.fail(error.status, f"error: {error}")
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # code of a model may exit
        if moved := report.moved_folder():
            return report.fail(moved.status, f"error: {moved}")
        if recipe is not None and is_out_of_memory(error):
            text = f"error: {this_rank()}{out_of_memory_text(error, recipe)}"
            return report.fail(Exit.OUT_OF_MEMORY, text)
        reason = traceback.format_exc(limit=-1)
        text = f"{this_rank()}{traceback.format_exc()}"
        return report.fail(Exit.CRASHED, text, f"{this_rank()}{reason}")
    if moved := report.moved_folder():
        return report.fail(moved.status, f"error: {moved}")
    if finished:
        status = report.end(Exit.FINISHED)
    else:
        say(saved_text(RunDir(Path(recipe.output.folder))))
        status = report.end(Exit.INTERRUPTED, "asked to stop; start it again to resume")
    end_world()  # never after a failure: under NCCL it waits for ranks that are in a collective
    return status


def saved_text(run: RunDir) -> str:
    """What an interrupted run saved, and how to go on."""
    steps = [
        f"stage {name} at step {int(newest[5:])}"
        for name, newest in run.progress().items()
        if newest.startswith("step-")
    ]
    saved = f"saved {', '.join(steps)}" if steps else "nothing to save yet"
    return f"stopped as asked: {saved}; the same command resumes"


def this_rank() -> str:
    """Which of several ranks an error comes from, as the head of its text."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return "" if is_alone else f"rank {os.environ.get('RANK', '0')}: "


def min_limit_seconds(world: World) -> float:
    """The shortest time limit of a step for the hang watchdog."""
    is_slow = world.device.type == "cuda" or world.local_size < world.size
    return MIN_LIMIT_SECONDS_GPU_OR_NODES if is_slow else MIN_LIMIT_SECONDS


def keep_libraries_quiet() -> None:
    """Silence warnings about code that a user of dtrain did not write."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    disable_progress_bar()
    for name in ("bitsandbytes", "DeepSpeed", "torch.distributed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with the launcher's engine and absolute paths."""
    kind: str = recipe.engine.kind
    if kind != "auto" or launcher_engine(os.environ):
        kind = resolve_engine(kind, os.environ)
    folders = {"folder": recipe.output.folder, "reuse": recipe.output.reuse}
    output = {k: str(user_path(v).absolute()) for k, v in folders.items() if v is not None}
    return recipe.model_copy(
        update={
            "engine": recipe.engine.model_copy(update={"kind": kind}),
            "output": recipe.output.model_copy(update=output),
            "model": recipe.model.model_copy(update={"base": absolute_model(recipe.model.base)}),
            "stages": [with_absolute_paths(stage) for stage in recipe.stages],
        }
    )


def absolute_model(address: str) -> str:
    """A model's address; the absolute path if it is a folder."""
    folder = user_path(address)
    return str(folder.absolute()) if folder.is_dir() else address


def with_absolute_paths(stage: Stage) -> Stage:
    """The stage with the absolute paths of its teacher and its template, if they are files."""
    if stage.distill is not None and stage.distill.teacher_folder is not None:
        teacher = absolute_model(stage.distill.teacher)
        distill = stage.distill.model_copy(update={"teacher": teacher})
        stage = stage.model_copy(update={"distill": distill})
    if stage.data.template in ("auto", "instruction"):
        return stage
    path = local_path(stage.data.template).absolute()
    return stage.model_copy(update={"data": stage.data.model_copy(update={"template": str(path)})})


def train(recipe: Recipe, allowed: set[str], report: ExitReport) -> bool:
    """Join the other ranks, prepare the data, run the stages; return False if interrupted."""
    run = RunDir(Path(recipe.output.folder))
    check_changeable(allowed, [stage.name for stage in recipe.stages])  # before they are recorded
    lock = run.lock() if is_first_rank() else None
    report.open(run)
    if lock:
        remove_partial_files(run.path)
        run.request(dump(recipe), keeps_stop=True)
        shutil.rmtree(run.heartbeats, ignore_errors=True)  # heartbeats of a killed attempt
    world = start_world(recipe.device)
    recipe = without_choice(recipe, world)
    inputs = world.rank0_first(
        lambda: prepare_inputs(recipe, verify=world.is_first, device=world.device)
    )
    check_same_on_all_ranks(inputs, world)
    report.watch_folder()
    recipe = limit_micro_batches(recipe, inputs.layout)
    # Until here a signal ends the process at once: what was prepared so far stays.
    stop = StopFlag(run.path, check_file=world.is_first)
    stop.listen()
    watchdog = HangWatchdog(
        run.heartbeats,
        world.rank,
        world.size,
        report=lambda text: report.fail(Exit.HANG, text),
        failure=report.failure_elsewhere,
        min_limit_seconds=min_limit_seconds(world),
    )
    follow_compilations(watchdog)
    finished = None
    watchdog.start()
    try:
        finished = run_chain(recipe, inputs, world, stop, watchdog, allowed)
    finally:
        watchdog.stop(finished=finished is not None)
    stop.forget_file()
    if lock:  # every rank has ended
        shutil.rmtree(run.heartbeats, ignore_errors=True)
    return finished
