"""What a stage's objectives need of the model that the stage starts from, before it trains."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from dtrain.checkpoints.reader import Checkpoint
from dtrain.core.cache_paths import computed_folder
from dtrain.core.errors import UserError
from dtrain.core.log import progress, say
from dtrain.core.stage_dir import read_merge_manifest
from dtrain.data.loader import Loader
from dtrain.distributed.tensor_utils import free_memory
from dtrain.engines.base import Engine
from dtrain.models.expert_layers import routers
from dtrain.objectives.base import Objective, StageContext, adapters_disabled
from dtrain.pipeline.stage_model import build_model_in_engine
from dtrain.pipeline.stage_record import StageSetup


def stage_context(setup: StageSetup, loader: Loader) -> StageContext:
    """What the objective of a stage or of a held-out set may need."""
    before = setup.recipe.parent_of(setup.stage)
    return StageContext(
        base=setup.base,
        cache=computed_folder("objectives", setup.folder.path),
        folder=setup.folder.path,
        start=start_inputs(setup),
        base_when_disabled=setup.stage.method.base_when_disabled,
        loader=loader,
        world=setup.world,
        frozen=setup.teachers,
        previous=setup.inputs.stages[before.name] if before else None,
    )


def start_inputs(setup: StageSetup) -> dict[str, Any]:
    """What decides the output of the model as the stage starts."""
    is_first_base = setup.base == setup.inputs.base
    manifest = {} if is_first_base else read_merge_manifest(setup.base, "result")
    inputs = {
        "base": setup.inputs.base_fingerprint if is_first_base else manifest["result"],
        "dtype": str(setup.dtype),
        "base_in_nf4": setup.method.traits.quantizes_base,
    }
    if setup.stage.method.base_when_disabled:
        return inputs
    return inputs | {
        "method": setup.folder.inputs["method"],
        "seed": setup.recipe.seed,
    }


def build_starting_model(
    setup: StageSetup,
    checkpoint: Checkpoint | None,
    objective: Objective,
    held_out: Sequence[Objective],
) -> tuple[Engine, tuple[int, int]] | None:
    """Build the model in its engine, let it compute what objectives need, load the checkpoint.

    What they need is of the model that the stage starts from, also when the stage is resumed.

    Args:
        checkpoint: where the training continues.
        objective: of the stage; `begin_stage` was called, also of the next ones.
        held_out: objectives of the held-out sets.

    Returns:
        As `build_model_in_engine`; None if a rank was asked to stop.

    Raises:
        UserError: as `build_model_in_engine`, or the checkpoint does not fit the model.
    """
    objectives = [objective, *held_out]
    lacking = [o for o in objectives if o.stored is not None and len(o.stored.missing())]
    engine, parameters = build_model_in_engine(setup)
    if not all(compute_stored(setup, engine, o) for o in lacking):
        return None
    if lacking:
        setup.teachers.release()  # objectives that need one in every step hold it themselves
    objective.begin_training(engine)
    if checkpoint is not None:
        _check_routers(checkpoint, setup, engine)
        engine.load(checkpoint)
    free_memory()
    return engine, parameters


def _check_routers(checkpoint: Checkpoint, setup: StageSetup, engine: Engine) -> None:
    """Check that a checkpoint has no routers if these are frozen; once they always trained."""
    method = setup.stage.method
    if not method.traits.trains_base or method.trains_router:  # adapters never trained them
        return
    if starts := tuple(f"{name}." for name in routers(engine.module)):
        trained = [name for name in checkpoint.names if name.startswith(starts)]
        if trained:
            raise UserError(
                f"an older dtrain trained the routers too ({trained[0]}), which stay frozen now",
                where=str(checkpoint.folder),
                fix="finish the run with that version, or start again with --fresh",
            )


def compute_stored(setup: StageSetup, engine: Engine, objective: Objective) -> bool:
    """Compute what an objective stores; return False if a rank was asked to stop."""
    stored = objective.stored
    assert stored is not None
    count, micro_batch = len(stored.missing()), setup.stage.train.micro_batch
    if not count:  # another objective has the same data
        return True
    engine.model.eval()
    say(f"computing values of {count:,} sequences, once, before the training")
    disabled = setup.stage.method.base_when_disabled
    with (
        engine.autocast(),
        adapters_disabled(engine.module) if disabled else nullcontext(),
        progress(f"stage {setup.stage.name}, reference", count) as bar,
    ):
        for done in stored.compute(
            lambda batch: objective.start_values(engine.model, batch), micro_batch
        ):
            bar.advance(done)
            if setup.world.sum([float(setup.stop.is_set(0.0, 0.0))])[0]:
                return False
    return True
