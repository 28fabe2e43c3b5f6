"""The plan during a run: resolve `auto` for these GPUs, and record measured memory and speed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dtrain.config.engines import DEFAULT_ENGINE
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.core.log import say, warn
from dtrain.distributed.world import World
from dtrain.planning.architectures import shape_of
from dtrain.planning.build_workload import build_workload
from dtrain.planning.calibration import CalibrationRecord, append_record, versions
from dtrain.planning.choose import has_choice, resolve
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import Gpu, gpu_of_device
from dtrain.planning.known_models import find_config
from dtrain.planning.speed import tokens_per_second
from dtrain.planning.workload import Cluster

CPU = Gpu("cpu", 16, 0.1, 10, 1, 1)  # its figures only serve to compare runs with each other


def without_choice(recipe: Recipe, world: World) -> Recipe:
    """The recipe with `auto` engine and micro-batches replaced, the same on every rank.

    On CPUs, and for a base whose shape the plan does not know: ddp, one sequence at once.
    """
    if recipe.engine.kind != "auto" and not has_choice(recipe):
        return recipe
    if world.device.type != "cuda":
        return simplest(recipe)
    text = world.broadcast_text(_chosen(recipe, world).model_dump_json() if world.is_first else "")
    return Recipe.model_validate_json(text)


def _chosen(recipe: Recipe, world: World) -> Recipe:
    try:
        chosen = simplest(resolve(recipe, cluster_of(world)))
    except UserError as error:
        warn(f"nothing is planned: {error.message}; ddp, one sequence at once")
        return simplest(recipe)
    micro = ", ".join(f"{x.name} {x.train.micro_batch}" for x in chosen.stages)
    say(f"auto: {chosen.engine.kind}, shard {chosen.engine.shard}, sequences at once: {micro}")
    return chosen


def simplest(recipe: Recipe) -> Recipe:
    """What is still `auto` becomes ddp and one sequence at once."""
    engine = recipe.engine
    if engine.kind == "auto":
        engine = engine.model_copy(update={"kind": DEFAULT_ENGINE})
    stages = []
    for stage in recipe.stages:
        update = {"micro_batch_size": stage.train.micro_batch}
        train = stage.train.model_copy(update=update)
        stages.append(stage.model_copy(update={"train": train}))
    return recipe.model_copy(update={"engine": engine, "stages": stages})


def cluster_of(world: World) -> Cluster:
    """The GPUs of this run."""
    nodes = max(1, world.size // max(1, world.local_size))
    return Cluster(gpu_of(world.device), nodes, world.size // nodes)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a rank."""
    if device.type != "cuda":
        return CPU
    properties = torch.cuda.get_device_properties(device)
    return gpu_of_device(properties.name, properties.total_memory)


def record_calibration(
    recipe: Recipe, stage: Stage, base: Path, facts: dict[str, Any], world: World
) -> dict[str, float]:
    """Add a finished stage to the calibration file; a base that the plan does not know is not.

    Args:
        base: folder of the model that the stage started from.
        facts: peak_memory_bytes and tokens_per_second, of the start that finished the stage.

    Returns:
        On GPUs what was planned: planned_peak_bytes and planned_tokens_per_second.
    """
    planned: dict[str, float] = {}
    with suppress(UserError, OSError):
        cluster = cluster_of(world)
        shape = shape_of(*find_config(str(base)))  # known ones alone: building takes seconds
        workload = build_workload(recipe, stage, shape, cluster)
        peak = build_engine_model(workload).peak_memory().peak
        speed = tokens_per_second(workload, cluster).middle
        if world.device.type == "cuda":
            planned = {"planned_peak_bytes": peak, "planned_tokens_per_second": round(speed, 1)}
        append_record(
            CalibrationRecord(
                gpu=cluster.gpu.name,
                engine=workload.engine,
                method=workload.method.kind,
                versions=versions(),
                base=recipe.model.base,
                peak=float(facts["peak_memory_bytes"]),
                speed=float(facts["tokens_per_second"]),
                planned_peak=peak,
                planned_speed=speed,
            )
        )
    return planned
