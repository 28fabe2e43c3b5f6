"""Host memory, disk space, and the number of tokens of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from glob import glob
from math import lcm
from pathlib import Path

from dtrain.config.data import Data, Source
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import local_path
from dtrain.planning.parameters import FLOAT32
from dtrain.planning.workload import Workload

# Host memory of one rank's libraries; tests/bench/LOG.md has 365 MB on a CPU, CUDA adds the rest.
RANK_HOST_BYTES = 3.0e9
# Bytes of English text for one token, for tokenizers of 32k to 150k entries.
TEXT_BYTES_PER_TOKEN = 4.2
MERGE_COPIES = 4  # of the largest tensor: as read, in float32, its delta, the result
OFFLOADED_BYTES = 16.0  # of a trained parameter: master, two moments, gradient


@dataclass(frozen=True)
class TokenCount:
    """The number of tokens that a stage trains on.

    Attributes:
        is_exact: the recipe sets the number; otherwise it is estimated from the files' sizes.
    """

    tokens: float
    is_exact: bool


def host_load_bytes(workload: Workload) -> float:
    """Host memory of a node while the base is loaded, without the page cache of its files.

    A rank reads one block at a time. Offloading keeps the base and what trains in host memory.
    """
    shape, e = workload.shape, workload.element_bytes
    ranks = min(workload.node_ranks, workload.ranks)
    block = e * max(shape.layer_parameters, shape.vocabulary * shape.hidden)
    offloaded = 0.0
    if workload.offload:
        offloaded = e * shape.parameters + OFFLOADED_BYTES * workload.trainable
    return ranks * (RANK_HOST_BYTES + block + offloaded / workload.ranks)


def host_save_bytes(workload: Workload) -> float:
    """Host memory of a node during training: each rank copies its share of a checkpoint there."""
    ranks = min(workload.node_ranks, workload.ranks)
    return ranks * (RANK_HOST_BYTES + checkpoint_bytes(workload) / workload.ranks)


def host_merge_bytes(workload: Workload) -> float:
    """Host memory of the merge: copies of the largest matrix, whatever the model's size."""
    shape = workload.shape
    largest = max(
        shape.vocabulary * shape.hidden, *(x.elements // x.experts for x in shape.linears)
    )
    return RANK_HOST_BYTES + MERGE_COPIES * FLOAT32 * largest


def checkpoint_bytes(workload: Workload) -> float:
    """Size of a checkpoint: what trains in float32, what the method keeps of it, and its optimizer
    state, not the frozen base."""
    values = 1 + OPTIMIZERS[workload.optimizer].averages + workload.method.kept_values
    return FLOAT32 * values * workload.trainable + workload.optimizer_state_bytes


def disk_bytes(recipe: Recipe, stage: Stage, workload: Workload) -> float:
    """Disk space of a stage: checkpoints (one more while it is written), adapter, merged model."""
    adapter = FLOAT32 * workload.trainable if workload.traits.adds_adapter else 0
    model = workload.element_bytes * workload.shape.parameters if recipe.merges(stage) else 0
    kept = recipe.output.keep_checkpoints + 1 + _permanent_checkpoints(recipe, stage)
    has_fisher = workload.kept_values - workload.method.kept_values > 1
    fisher = FLOAT32 * workload.trainable if has_fisher else 0
    return kept * checkpoint_bytes(workload) + fisher + adapter + model


def _permanent_checkpoints(recipe: Recipe, stage: Stage) -> int:
    """Checkpoints of every n-th step; 0 where the number of steps is not known."""
    train, every, count = stage.train, recipe.output.keep_every_steps, stage_tokens(stage)
    if every is None or train.checkpoint_every_steps is None or count is None:
        return 0
    steps = count.tokens / (train.global_batch_size * stage.data.sequence_length)
    return int(steps // lcm(every, train.checkpoint_every_steps))


def stage_tokens(stage: Stage) -> TokenCount | None:
    """The tokens that a stage trains on; None where its data are not on this machine."""
    train, data = stage.train, stage.data
    if train.tokens is not None:
        return TokenCount(train.tokens, True)
    if train.steps is not None:
        return TokenCount(train.steps * train.global_batch_size * data.sequence_length, True)
    epoch = epoch_tokens(data)
    if epoch is None or train.epochs is None:
        return None
    without_replay = 1 - data.replay.ratio if data.replay else 1
    return TokenCount(epoch * train.epochs / without_replay, False)


def epoch_tokens(data: Data) -> float | None:
    """Tokens of an epoch: of all sources, or with weights of one pass over the heaviest source."""
    sizes = [_source_bytes(source) for source in data.sources]
    if not all(sizes):
        return None
    weights = [source.weight for source in data.sources if isinstance(source.weight, float)]
    if len(weights) < len(sizes):
        return sum(sizes) / TEXT_BYTES_PER_TOKEN
    heaviest = weights.index(max(weights))
    return sizes[heaviest] / TEXT_BYTES_PER_TOKEN * sum(weights) / weights[heaviest]


def _source_bytes(source: Source) -> int:
    """Bytes of a source's files; 0 if there are none."""
    path = local_path(source.path)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    else:
        files = [Path(name) for name in glob(str(path), recursive=True)]
    return sum(file.stat().st_size for file in files)
