"""Whether a start may change the run: every check that needs the run folder, and the acceptance.

A start that is refused leaves recipe, lineage, exit report, metrics and stages as they were.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from dtrain.checkpoints.identity import changes_allowed_in
from dtrain.config.checks import check_batches
from dtrain.config.load import dump
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import NOT_TRAINED
from dtrain.distributed.tensor_utils import device_name
from dtrain.distributed.world import World
from dtrain.monitoring.starts import record_start
from dtrain.pipeline.evaluator import Evaluations
from dtrain.pipeline.stage_record import StageRecord


def check_start(
    recipe: Recipe,
    run: RunDir,
    records: Mapping[str, StageRecord],
    evaluations: Evaluations,
    world: World,
    allowed: Iterable[str],
) -> None:
    """Check a start against all that the run has trained; every rank finds the same.

    Args:
        records: of the recipe's stages, by name.
        allowed: keys that may differ from those that a stage was trained with.

    Raises:
        UserError: a stage was trained with other inputs, is not in the recipe any more, fails a
            gate, or cannot run on so many ranks.
    """
    check_batches(recipe, world.size)
    check_no_stage_dropped(run, records)
    for name, record in records.items():
        record.check_same_inputs(changes_allowed_in(name, allowed))
    for name, record in records.items():
        if record.is_complete():
            evaluations.check_gates(name)  # they may be stricter now


def check_no_stage_dropped(run: RunDir, names: Iterable[str]) -> None:
    """Check that the recipe has every stage that the run has trained.

    Raises:
        UserError: it lacks one.
    """
    for name, progress in run.progress().items():
        if name not in set(names) and progress != NOT_TRAINED:
            raise UserError(
                f"the run has trained a stage that the recipe does not have ({progress})",
                where=str(run.stage(name).path),
                fix=f"name the stage {name} again, or start again with --fresh in a new folder",
            )


def accept(recipe: Recipe, run: RunDir, world: World) -> None:
    """Let the start change the run: its recipe becomes the run's, and it counts as an attempt.

    All ranks call it, after `check_start`.
    """
    device = device_name(world.device)
    ranks = [json.loads(data) for data in world.gather_bytes(_host_and_device(device))]
    if world.is_first:
        run.accept(dump(recipe))
        record_start(
            run,
            nodes=max(1, world.size // world.local_size),
            ranks=world.size,
            device=device,
            hosts=devices_by_host(ranks),
            cuda=torch.version.cuda if world.device.type == "cuda" else None,
        )
    world.barrier()


def _host_and_device(device: str) -> bytes:
    return json.dumps([platform.node(), device]).encode()


def devices_by_host(ranks: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{"node1": "8 x NVIDIA H100"} from the (host, device) of each rank."""
    hosts: dict[str, Counter[str]] = {}
    for host, device in ranks:
        hosts.setdefault(host, Counter())[device] += 1
    return {
        host: ", ".join(f"{count} x {device}" for device, count in devices.items())
        for host, devices in hosts.items()
    }
