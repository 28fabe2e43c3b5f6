"""A stage's results: the adapter in PEFT layout and the merged model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from dtrain.checkpoints.reader import Checkpoint
from dtrain.core.hashes import fingerprint
from dtrain.core.locks import ShardLocks
from dtrain.distributed.world import World
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.chat_files import adapter_chat_files, merged_chat_files
from dtrain.merge.from_checkpoint import read_parameter, trained_weights
from dtrain.merge.merge import MergeJob, default_processes
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.models.weight_files import weight_files
from dtrain.pipeline.stage_record import StageSetup


def export_adapter(setup: StageSetup, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Write the adapter and remove an old merged model (first rank only).

    Results of an earlier attempt may come from fewer steps, or be damaged: they are replaced.
    """
    if setup.method.traits.adds_adapter:
        tensors = {name: read_parameter(checkpoint, name) for name in checkpoint.names}
        files = adapter_chat_files(setup.stage, setup.base, setup.inputs.tokenizer)
        setup.method.save(setup.folder.adapter, model, tensors, base=str(setup.base), files=files)
    if setup.is_merged:
        shutil.rmtree(setup.folder.merged, ignore_errors=True)


def export_merged_model(setup: StageSetup, checkpoint: Checkpoint) -> None:
    """Write the merged model, on all ranks together."""

    def merge(processes: int) -> None:
        chat_files = adapter_chat_files(setup.stage, setup.base, setup.inputs.tokenizer)
        job = MergeJob(
            setup.base,
            setup.folder.merged,
            source=setup.folder.identity,
            processes=processes,
            files=merged_chat_files(setup.base, chat_files),
        )
        traits = setup.method.traits
        if traits.trains_base:
            job.replace_weights(trained_weights(checkpoint))
            return
        quantized_base = None
        if traits.quantizes_base:  # the adapter was trained on the 4-bit weights
            trust_code = setup.recipe.model.trust_remote_code
            quantized_base = Nf4Base(job.tensors, setup.dtype, trust_code, setup.world.device)
        adapter = MergeableAdapter.open(setup.folder.adapter, job.tensors)
        job.merge_adapters([adapter_input(adapter, quantized_base=quantized_base)])

    merge_on_ranks(setup.world, setup.base, setup.folder.merge_locks, merge)


def merge_on_ranks(world: World, base: Path, lock_file: Path, merge: Callable[[int], None]) -> None:
    """Call `merge` on every rank that can share the work; return when all shards are written.

    A rank takes no part if its files of the base have other modification times, as in another
    node's own cache, or if it does not see the first rank's locks, as on a file system whose locks
    are local to a node.

    Args:
        lock_file: in a folder that all ranks write to.
        merge: takes the number of shards that this rank may rewrite at once.
    """
    locks = ShardLocks(lock_file)
    try:
        if world.is_first:
            locks.acquire(0)
        local_state = _file_state(base)
        is_same = world.broadcast_text(local_state) == local_state
        if world.is_first or (is_same and not locks.acquire(0)):
            merge(max(default_processes() // world.local_size, 1))
        world.barrier()
    finally:
        locks.close()
    if world.is_first:
        lock_file.unlink(missing_ok=True)


def _file_state(base: Path) -> str:
    files = [(path.name, path.stat()) for path in weight_files(base)]
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
