"""A stage's base model with its method, in an engine, at a checkpoint's state."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.engines import ENGINES
from dtrain.core.log import say, warn
from dtrain.core.units import count
from dtrain.engines.base import Engine, MaterializeFn, build_engine
from dtrain.merge.from_checkpoint import read_parameter
from dtrain.merge.merge import check_mergeable
from dtrain.models.kernels import compiled
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.kernels.warm_up import compile_ahead
from dtrain.models.load import load_base
from dtrain.models.sharded_loading import stream_base
from dtrain.models.tensor_utils import parameter_counts
from dtrain.pipeline.stage_record import StageSetup


def build_model_in_engine(
    setup: StageSetup, checkpoint: Checkpoint | None
) -> tuple[Engine, tuple[int, int]]:
    """Load the base, attach the method, apply kernels, wrap it in the engine, load the checkpoint.

    Returns:
        The engine, and the numbers of trainable and of all parameters.
    """
    recipe, stage, world, method = setup.recipe, setup.stage, setup.world, setup.method
    base, load_weights = _open_base(setup)
    model = method.attach(base, seed=recipe.seed, device=world.device)
    _check_merge(setup, model)

    def materialize(block: torch.nn.Module) -> None:
        load_weights(block)
        method.on_weights_loaded(block)

    if not ENGINES[recipe.engine.kind].shards_base:
        materialize(model)
    trainable, total = parameter_counts(model)
    say(
        f"stage {stage.name}: {stage.kind}, {stage.method.kind}, "
        f"{count(trainable)} of {count(total)} parameters train ({trainable / total:.2%}), "
        f"{recipe.engine.kind} on {world.size} x {world.device.type}, {setup.dtype}"
    )
    compiled.set_enabled(on=recipe.determinism != "strict")
    say(f"kernels: {apply_kernels(model, recipe.model)}")
    if recipe.model.kernels != "off":
        compile_ahead(world.device, setup.dtype, trains_base=method.traits.trains_base)
    if checkpoint is not None:
        _load_trainable(model, checkpoint)
    engine = build_engine(model, recipe, stage, world, materialize)
    if checkpoint is not None:
        checkpoint.restore(engine.parameter_shards())
        engine.on_state_loaded(checkpoint.state["updates"])
    return engine, (trainable, total)


def _open_base(setup: StageSetup) -> tuple[PreTrainedModel, MaterializeFn]:
    """The base without storage, and the function that loads a block of it."""
    method, options = setup.method, setup.recipe.model
    settings: dict[str, Any] = {
        "quantized": method.traits.quantizes_base,
        "dtype": method.base_dtype(setup.dtype),
        "device": setup.world.device,
    }
    streamed = stream_base(setup.base, options, **settings)
    if not streamed.converted:
        return streamed.model, streamed.materialize
    _check_merge(setup, method.attach(streamed.model, seed=0))  # before the slow load
    if ENGINES[setup.recipe.engine.kind].shards_base:
        warn(
            f"{setup.base}: transformers converts {len(streamed.converted)} tensors when it loads "
            f"them ({streamed.converted[0]}, …), so every rank loads the whole base before it is "
            "sharded"
        )
    return load_base(setup.base, options, **settings), lambda block: None


def _check_merge(setup: StageSetup, model: torch.nn.Module) -> None:
    """Check before the training that the result can be merged."""
    if setup.is_merged:
        check_mergeable(setup.base, setup.method.changed_tensors(model))


@torch.no_grad()
def _load_trainable(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into the model before an engine wraps it.

    DeepSpeed copies the weights that it finds at the start, and would compute with those.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta and name in checkpoint.names:
            parameter.copy_(read_parameter(checkpoint, name))
