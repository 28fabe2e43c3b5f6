"""Host memory, disk, and how many tokens a stage has: what a plan needs beside the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from glob import glob
from math import lcm
from pathlib import Path

from dtrain.config.schema import Data, Recipe, Source, Stage
from dtrain.core.cache_paths import local_path
from dtrain.planning.constants import RANK_HOST_BYTES, TEXT_BYTES_PER_TOKEN
from dtrain.planning.parameters import FLOAT32
from dtrain.planning.static_memory import ADAM_BYTES
from dtrain.planning.workload import Workload

MERGE_COPIES = 4  # of the largest tensor: as read, in float32, its delta, the result


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a stage.

    Attributes:
        is_exact: the recipe says so; otherwise it is guessed from the size of the files.
    """

    tokens: float
    is_exact: bool


def host_load_bytes(workload: Workload) -> float:
    """Host memory of a node while the base is loaded, beside the files' page cache.

    A rank reads one block at a time; offloading keeps what trains and the base in host memory.
    """
    shape, e = workload.shape, workload.element_bytes
    ranks = min(workload.node_ranks, workload.ranks)
    block = e * max(shape.layer_parameters, shape.vocabulary * shape.hidden)
    held = 0.0
    if workload.offload:
        held = (e * shape.parameters + 16.0 * workload.trainable) / workload.ranks
    return ranks * (RANK_HOST_BYTES + block + held)


def host_save_bytes(workload: Workload) -> float:
    """Host memory of a node while it trains: each rank keeps its share of a checkpoint there."""
    ranks = min(workload.node_ranks, workload.ranks)
    return ranks * (RANK_HOST_BYTES + checkpoint_bytes(workload) / workload.ranks)


def host_merge_bytes(workload: Workload) -> float:
    """Host memory of the merge: one tensor, whatever the model's size."""
    shape = workload.shape
    largest = max(shape.vocabulary * shape.hidden, *(x.elements for x in shape.linears))
    return RANK_HOST_BYTES + MERGE_COPIES * FLOAT32 * largest


def checkpoint_bytes(workload: Workload) -> float:
    """One checkpoint: what trains in float32, and its optimizer state; never the frozen base."""
    return (FLOAT32 + ADAM_BYTES[workload.optimizer]) * workload.trainable


def disk_bytes(recipe: Recipe, stage: Stage, workload: Workload, *, is_last: bool) -> float:
    """What a stage leaves behind, and the checkpoint that is being written beside those kept."""
    adapter = 0 if workload.is_full else FLOAT32 * workload.trainable
    merged = recipe.output.merge or not is_last
    model = workload.element_bytes * workload.shape.parameters if merged else 0
    kept = recipe.output.keep_checkpoints + 1 + _kept_for_good(recipe, stage)
    return kept * checkpoint_bytes(workload) + adapter + model


def _kept_for_good(recipe: Recipe, stage: Stage) -> int:
    """Checkpoints of every n-th step; 0 where the number of steps is not known."""
    train, every, amount = stage.train, recipe.output.keep_every_steps, stage_tokens(stage)
    if every is None or train.checkpoint_every_steps is None or amount is None:
        return 0
    steps = amount.tokens / (train.global_batch_size * stage.data.sequence_length)
    return int(steps // lcm(every, train.checkpoint_every_steps))


def stage_tokens(stage: Stage) -> TokenCount | None:
    """How many tokens a stage trains on; None where its data are not on this machine."""
    train, row = stage.train, stage.data.sequence_length
    if train.tokens is not None:
        return TokenCount(train.tokens, True)
    if train.steps is not None:
        return TokenCount(train.steps * train.global_batch_size * row, True)
    passes = epoch_tokens(stage.data)
    if passes is None or train.epochs is None:
        return None
    replay = stage.data.replay
    return TokenCount(passes * train.epochs / (1 - replay.ratio if replay else 1), False)


def epoch_tokens(data: Data) -> float | None:
    """Of one pass: all sources, or as many as go with one pass over the heaviest."""
    sizes = [source_bytes(source) for source in data.sources]
    if not all(sizes):
        return None
    shares = [source.weight for source in data.sources if isinstance(source.weight, float)]
    if len(shares) < len(sizes):
        return sum(sizes) / TEXT_BYTES_PER_TOKEN
    heaviest = shares.index(max(shares))
    return sizes[heaviest] / TEXT_BYTES_PER_TOKEN * sum(shares) / shares[heaviest]


def source_bytes(source: Source) -> int:
    """Bytes of a source's files; 0 where there are none."""
    path = local_path(source.path)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [Path(name) for name in glob(str(path), recursive=True)]
    return sum(file.stat().st_size for file in files)
