"""One stage, from its base to its adapter and merged model."""

from __future__ import annotations

from typing import Any

import torch

from dtrain.checkpoints.reader import Checkpoint
from dtrain.core.log import say
from dtrain.core.run_dir import BASE_MODEL
from dtrain.core.units import duration, size
from dtrain.data.loader import Loader
from dtrain.data.packed_dataset import PackedDataset
from dtrain.distributed.tensor_utils import free_memory, peak_memory_bytes, reset_peak_memory
from dtrain.engines.base import Engine
from dtrain.monitoring.run_record import describe_used
from dtrain.objectives.base import Objective
from dtrain.objectives.regularizers.base import build_stage_objective
from dtrain.pipeline.auto_settings import record_calibration
from dtrain.pipeline.precompute import build_starting_model, stage_context
from dtrain.pipeline.stage_model import (
    export_adapter,
    export_merged_model,
    set_generation_config,
)
from dtrain.pipeline.stage_record import StageSetup
from dtrain.training.callbacks import (
    AlertWatch,
    Callback,
    DivergenceStop,
    HangWatchdogCallback,
    NonFiniteStop,
    ProgressBar,
    RunFolderWatch,
)
from dtrain.training.checkpointer import Checkpointer, open_final_checkpoint
from dtrain.training.held_out import HeldOutEvaluator, HeldOutSet
from dtrain.training.progress import StageProgress
from dtrain.training.trackers import TrackerContext, build_trackers
from dtrain.training.trainer import Trainer, total_sequences

MEASURED_SEQUENCES = 4096


def run_stage(setup: StageSetup) -> bool:
    """Train, save the adapter, merge.

    Returns:
        Whether the stage is complete; if not, it was asked to stop and can be resumed.
    """
    world = setup.world
    trained = train_stage(setup)
    # Wait until every rank's share of the last checkpoint is on disk: a launcher kills the others
    # half a minute after the first rank has ended.
    world.barrier()
    if trained is None:
        return False
    model, facts, checkpoint = trained
    if world.is_first:
        export_adapter(setup, model, checkpoint)
    del trained, model
    free_memory()
    world.barrier()
    if setup.is_merged:
        export_merged_model(setup, checkpoint)
    if world.is_first:
        record_result(setup, facts, checkpoint)
    world.barrier()
    return True


def train_stage(setup: StageSetup) -> tuple[torch.nn.Module, dict[str, Any], Checkpoint] | None:
    """Train to the end, and evaluate the checkpoint that `output.use` asks for.

    Returns:
        The trained model, facts for the stage's record, and the checkpoint; None if the stage was
        interrupted.
    """
    device = setup.world.device
    reset_peak_memory(device)
    checkpointer = build_checkpointer(setup)
    checkpoint = checkpointer.find_resumable(setup.folder.allowed_changes())
    objective, loader = build_stage_objective(setup.stage), build_loader(setup)
    held_out = setup.evaluations.held_out_sets(setup.stage, setup.world)
    loaders = {objective: loader} | {s.objective: s.loader for s in held_out.values()}
    for each, its_loader in loaders.items():
        each.begin_stage(stage_context(setup, its_loader))
    evaluated = [s.objective for s in held_out.values()]
    started = build_starting_model(setup, checkpoint, objective, evaluated)
    if started is None:
        return None
    engine, parameters = started
    load_peak = peak_memory_bytes(device)
    trainer = build_trainer(setup, engine, checkpointer, checkpoint, objective, loader, held_out)
    set_generation_config(setup, engine.module, is_trained=False)
    is_untrained = trainer.progress.step == 0 and setup.base == setup.inputs.base
    if is_untrained and setup.evaluations.wants_base():
        setup.evaluations.record_base(engine, held_out)
    reset_peak_memory(device)  # the plan is compared with the peak of the steps
    set_generation_config(setup, engine.module, is_trained=True)
    if not trainer.fit():
        return None
    step_peak = peak_memory_bytes(device)
    facts = stage_facts(setup, trainer.progress, parameters)
    if setup.recipe.output.use == "best":
        used, facts["used"] = trainer.use_best()
        say(f"stage {setup.stage.name} is {describe_used(facts)}")
    else:
        used = open_final_checkpoint(setup.folder.checkpoints, setup.world, facts["steps"])
    setup.evaluations.record(setup.stage.name, engine, held_out)
    losses = setup.evaluations.losses_of(setup.stage.name)
    divergence_stop(setup).check_held_out(trainer.progress.step, losses)
    setup.evaluations.check_gates(setup.stage.name)  # before anything is published
    facts |= {
        "attempt_tokens_per_second": trainer.tokens_per_second,
        "load_peak_memory_bytes": load_peak,
        "peak_memory_bytes": step_peak,
    }
    engine.close()
    setup.teachers.release()
    return engine.module, facts, used


def build_checkpointer(setup: StageSetup) -> Checkpointer:
    """The stage's checkpoints; all ranks build it together."""
    return Checkpointer(
        setup.folder.checkpoints,
        setup.world,
        inputs=setup.folder.inputs,
        dtype=dtype_name(setup),
        every_steps=setup.stage.train.checkpoint_every_steps,
        output=setup.recipe.output,
    )


def build_trainer(
    setup: StageSetup,
    engine: Engine,
    checkpointer: Checkpointer,
    checkpoint: Checkpoint | None,
    objective: Objective,
    loader: Loader,
    held_out: dict[str, HeldOutSet],
) -> Trainer:
    """A trainer at the checkpoint's step, or at the start."""
    state = checkpoint.state["progress"] if checkpoint else {}
    progress = StageProgress(**state)
    return Trainer(
        engine=engine,
        objective=objective,
        loader=loader,
        checkpointer=checkpointer,
        evaluator=build_evaluator(setup, held_out),
        stop=setup.stop,
        callbacks=build_callbacks(setup, progress),
        progress=progress,
        seed=setup.recipe.seed,
    )


def build_loader(setup: StageSetup) -> Loader:
    """The stage's training batches."""
    train, dataset = setup.stage.train, setup.inputs.stages[setup.stage.name]
    mean_tokens = tokens_per_sequence(dataset)
    weights = setup.stage.data.loss_weights
    loader = Loader(
        dataset,
        seed=setup.recipe.seed,
        global_batch=train.global_batch_size,
        total_sequences=total_sequences(train, dataset.sequences_in_epochs, mean_tokens),
        alone=not setup.inputs.layout.packed,
        loss_weights=weights if any(w != 1.0 for w in weights) else (),
    )
    say(f"{dataset.describe()}; {loader.steps} steps of {train.global_batch_size} sequences")
    return loader


def tokens_per_sequence(dataset: PackedDataset) -> float:
    """Mean number of tokens in a sequence, measured on the first ones of the dataset."""
    measured = min(dataset.sequences_per_epoch, MEASURED_SEQUENCES)
    return float(dataset.tokens(dataset.sequence_ids_at(0, measured, seed=0)).mean())


def build_evaluator(setup: StageSetup, held_out: dict[str, HeldOutSet]) -> HeldOutEvaluator:
    """Evaluation during the stage, if the recipe asks for it."""
    train = setup.stage.train
    sets = {} if train.evaluate_every_steps is None else held_out
    for one in sets.values():
        for note in one.loader.dataset.notes():
            say(f"evaluation: {note}")
    return HeldOutEvaluator(sets, train, setup.evaluations.scorers)


def build_callbacks(setup: StageSetup, progress: StageProgress) -> list[Callback]:
    """Callbacks of this rank."""
    stage = setup.stage
    context = TrackerContext(setup.recipe, stage, setup.folder, progress.step)
    trackers = build_trackers(context) if setup.world.is_first else []
    return [
        HangWatchdogCallback(setup.watchdog),
        RunFolderWatch(setup.folder.path.parent),
        NonFiniteStop(stage.name, stage.train.max_non_finite_steps),
        divergence_stop(setup),
        *([AlertWatch(trackers), *trackers] if setup.world.is_first else []),
        ProgressBar(f"stage {stage.name}", steps_after(setup) if setup.world.is_first else 0),
    ]


def steps_after(setup: StageSetup) -> float:
    """What the later stages train on, in steps of this stage with as many tokens."""
    stages = setup.recipe.stages
    later = stages[stages.index(setup.stage) + 1 :]
    here = tokens_per_sequence(setup.inputs.stages[setup.stage.name])
    tokens = 0.0
    for stage in later:
        dataset = setup.inputs.stages[stage.name]
        mean = tokens_per_sequence(dataset)
        tokens += mean * total_sequences(stage.train, dataset.sequences_in_epochs, mean)
    return tokens / (here * setup.stage.train.global_batch_size)


def divergence_stop(setup: StageSetup) -> DivergenceStop:
    """The check of the stage's losses against those of the model that it starts from."""
    parent = setup.recipe.parent_of(setup.stage)
    before = parent.name if parent else BASE_MODEL
    return DivergenceStop(setup.stage, lambda: setup.evaluations.losses_of(before))


def stage_facts(
    setup: StageSetup, progress: StageProgress, parameters: tuple[int, int]
) -> dict[str, Any]:
    """Facts of the finished stage, for its record.

    Args:
        parameters: how many are trainable, and all.
    """
    trainable, total = parameters
    return {
        "engine": setup.recipe.engine.kind,
        "ranks": setup.world.size,
        "dtype": dtype_name(setup),
        "steps": progress.step,
        "non_finite_steps": progress.non_finite,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "sources": setup.inputs.stages[setup.stage.name].source_counts(),
    }


def dtype_name(setup: StageSetup) -> str:
    """The compute dtype as recorded, for example "bfloat16"."""
    return str(setup.dtype).removeprefix("torch.")


def record_result(setup: StageSetup, facts: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Record the stage as complete (first rank only)."""
    speed = facts.pop("attempt_tokens_per_second")
    facts["checkpoint_bytes"] = checkpoint.size_bytes
    if speed:
        measured = facts | {"tokens_per_second": speed}
        facts |= record_calibration(setup.recipe, setup.stage, setup.base, measured, setup.world)
    setup.folder.finish(facts)
    say(
        f"stage {setup.stage.name}: {facts['steps']} steps in {duration(facts['seconds'])}, "
        f"{facts['tokens_per_second']:.0f} tokens/s, peak {size(facts['peak_memory_bytes'])} "
        f"a rank, checkpoint {size(checkpoint.size_bytes)}"
    )
