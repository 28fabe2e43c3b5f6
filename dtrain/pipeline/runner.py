"""Run all stages of a recipe, one after another, in the same processes."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtrain.checkpoints.identity import changes_allowed_in
from dtrain.config.schema import Recipe, Stage
from dtrain.core.files import write_json
from dtrain.core.lazy_import import LazyModule
from dtrain.core.log import say, warn
from dtrain.core.run_dir import RunDir
from dtrain.distributed.hang_watchdog import HangWatchdog
from dtrain.distributed.world import World
from dtrain.evaluation.generation import GenerationScorer
from dtrain.evaluation.scorer import Scorer
from dtrain.monitoring.report import write_report
from dtrain.monitoring.run_record import run_summary
from dtrain.monitoring.starts import read_starts, record_end, start_id
from dtrain.pipeline.acceptance import accept, check_start
from dtrain.pipeline.evaluator import Evaluations
from dtrain.pipeline.reuse import drop_link, reuse_stages
from dtrain.pipeline.stage_inputs import Inputs
from dtrain.pipeline.stage_record import StageRecord, StageSetup, stage_record
from dtrain.pipeline.stage_run import run_stage
from dtrain.pipeline.teachers import TeacherModels
from dtrain.recipes import shipped
from dtrain.serving.model_card import write_stage_cards
from dtrain.serving.run_models import ServedRun
from dtrain.training.preemption import StopFlag

# It needs an extra.
task_scorer: Any = LazyModule("dtrain.evaluation.task_scorer")


def run_chain(
    recipe: Recipe,
    inputs: Inputs,
    world: World,
    stop: StopFlag,
    watchdog: HangWatchdog,
    allowed: set[str],
) -> bool:
    """Run the stages that are not complete; return False if interrupted.

    Args:
        allowed: keys that may differ from those that an incomplete stage was started with.
    """
    run = Path(recipe.output.folder)
    teachers = TeacherModels(recipe, world, inputs.teachers)
    scorers = build_scorers(recipe, inputs, world)
    evaluations = Evaluations(run, recipe, inputs.sets, inputs.layout, teachers, scorers)
    folders = stage_records(run, recipe, inputs)
    check_start(recipe, RunDir(run), folders, evaluations, world, allowed)
    accept(recipe, RunDir(run), world)
    if recipe.output.reuse is not None:
        finished = RunDir(Path(recipe.output.reuse))
        evaluations.adopt(finished.evaluation, reuse_stages(recipe, finished, folders, world))
    done = complete_stages(recipe, folders, world)
    if world.is_first:
        write_lineage(run, recipe, inputs, done)
    for stage, folder in zip(recipe.stages, folders.values(), strict=True):
        parent = recipe.parent_of(stage)
        base = folders[parent.name].merged if parent else inputs.base
        if folder in done:
            say(f"stage {stage.name}: {_origin(folder)} ({folder.identity[:12]}), not run again")
            evaluations.check_gates(stage.name)  # of a stage of another run
        else:
            if world.is_first:
                folder.begin(changes_allowed_in(stage.name, allowed))
            world.barrier()
            setup = StageSetup(
                recipe, stage, folder, base, inputs, evaluations, teachers, world, stop, watchdog
            )
            if not run_stage(setup):
                return False
            done.append(folder)
            if world.is_first:
                write_lineage(run, recipe, inputs, done)
        if world.is_first:
            write_cards(ServedRun(run.absolute(), recipe), stage)
    finish(run, recipe, inputs, done, world)
    return True


def build_scorers(recipe: Recipe, inputs: Inputs, world: World) -> list[Scorer]:
    """What scores the base and the model after each stage.

    Raises:
        UserError: a judge's endpoint cannot be used, and the run has not begun.
    """
    scorers: list[Scorer] = []
    if inputs.tasks:
        scorers.append(task_scorer.TaskScorer(inputs.tasks, inputs.tokenizer))
    if inputs.prompts:
        generation = GenerationScorer(recipe, inputs.prompts, inputs.tokenizer)
        generation.check_metrics(world)
        scorers.append(generation)
    return scorers


def stage_records(run: Path, recipe: Recipe, inputs: Inputs) -> dict[str, StageRecord]:
    """The record of each stage, by name; its parent's identity is part of its own."""
    folders: dict[str, StageRecord] = {}
    for stage in recipe.stages:
        parent = recipe.parent_of(stage)
        identity = folders[parent.name].identity if parent else inputs.base_fingerprint
        folders[stage.name] = stage_record(run, recipe, stage, inputs, identity)
    return folders


def complete_stages(
    recipe: Recipe, folders: dict[str, StageRecord], world: World
) -> list[StageRecord]:
    """The complete stages whose results are undamaged.

    A merged model is hashed only where it is needed: as the run's result, or as the base of a stage
    that is not complete.

    Args:
        folders: from `stage_records`.
    """
    done: list[StageRecord] = []
    for stage in reversed(recipe.stages):
        folder = folders[stage.name]
        children = [x for x in recipe.stages if recipe.parent_of(x) == stage]
        needed = any(folders[child.name] not in done for child in children)
        needed |= not children and recipe.merges(stage)
        complete = folder.is_complete()
        if complete:
            damage = folder.find_corruption(with_merged=needed) if world.is_first else ""
            if damage := world.broadcast_text(damage):
                drop_link(folder, world)
                warn(f"stage {stage.name}: {damage}; it is rebuilt from the last checkpoint")
                complete = False
        if complete:
            done.append(folder)
    return done


def _origin(folder: StageRecord) -> str:
    is_reused = folder.path.is_symlink()
    return f"reused from {folder.path.resolve()}" if is_reused else "already complete"


def finish(
    run: Path, recipe: Recipe, inputs: Inputs, done: list[StageRecord], world: World
) -> None:
    """Record the end, write the report, and print the summary."""
    if world.is_first:
        record_end(RunDir(run), start_id(os.environ), "finished", "")
        write_lineage(run, recipe, inputs, done)
        write_report(run)
        say(f"{run_summary(run)}\n{next_step(recipe)}")
    world.barrier()  # torchrun stops ranks of other nodes minutes after the first has ended


def next_step(recipe: Recipe) -> str:
    """The command to type next."""
    command = Path(sys.executable).with_name("dtrain")
    if shutil.which("dtrain") == str(command):
        command = Path("dtrain")
    with suppress(ValueError):
        command = command.relative_to(Path.cwd())
    if recipe.name in shipped():
        return f"next           {command} recipes copy {recipe.name} my.yaml, edit it, run it"
    if any(stage.adapter_name for stage in recipe.stages):
        return f"next           {command} serve {recipe.output.folder}"
    return f"next           {command} chat {recipe.output.folder}"


def write_lineage(run: Path, recipe: Recipe, inputs: Inputs, done: list[StageRecord]) -> None:
    """Record the inputs of every artifact, and the attempts that made them.

    Args:
        done: the complete stages.
    """
    base = {"identity": inputs.base_fingerprint, "path": str(inputs.base)}
    artifacts: list[dict[str, Any]] = []
    methods = {stage.name: stage.method for stage in recipe.stages}
    order = [stage.name for stage in recipe.stages]
    for folder in sorted(done, key=lambda folder: order.index(folder.path.name)):
        record = folder.read() or {}
        made_from = {
            "parent": folder.inputs["parent"],
            "data": folder.inputs["data"]["content"],
            "settings": folder.inputs,
        }
        adapter = methods[folder.path.name].adapter
        if adapter is not None and adapter.initial_adapter:
            made_from["adapter"] = {
                "path": adapter.initial_adapter,
                "content": folder.inputs["method"]["from_adapter"],
            }
        artifacts.append(
            {
                "name": folder.path.name,
                "kind": "stage",
                "identity": folder.identity,
                "made_from": made_from,
                **record.get("facts", {}),
                "adapter": _inside(run, folder.adapter),
                "merged": _inside(run, folder.merged),
            }
        )
    attempts = [asdict(start) for start in read_starts(RunDir(run))]
    lineage = {"name": recipe.name, "base": base, "artifacts": artifacts, "attempts": attempts}
    write_json(RunDir(run).lineage, lineage)


def write_cards(run: ServedRun, stage: Stage) -> None:
    """Write the model cards of a complete stage; a full disk does not end the run."""
    try:
        write_stage_cards(run, stage)
    except OSError as error:
        warn(f"stage {stage.name}: no model card was written: {error.strerror or error}")


def _inside(run: Path, path: Path) -> str | None:
    return str(path.relative_to(run)) if path.exists() else None
