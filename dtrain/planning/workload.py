"""One stage on one cluster, as numbers: all that memory, time and bytes are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.config import deepspeed_file
from dtrain.config.methods import Lora
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.planning.gpus import Gpu
from dtrain.planning.kernel_sizes import KERNELS
from dtrain.planning.shapes import LinearShape, ModelShape, adapted, adapter_parameters

REPLICATED = ("ddp", "zero2")  # every rank holds the whole base
ZERO = ("zero2", "zero3")
BUCKET_ELEMENTS = 100_000_000  # reduce_bucket_size of ds_configs/*.json; a test compares
LIVE_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters and stage3_max_reuse_distance there
PERSISTENT_ELEMENTS = 100_000  # stage3_param_persistence_threshold there
MOST_ELEMENTS = 2**63  # more are no number of elements


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, as many on each node."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8

    @property
    def ranks(self) -> int:
        """Ranks of a run on all of it."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Workload:
    """A stage as it would run.

    Attributes:
        method: full, lora or qlora.
        rank: of the adapter.
        shard: ranks that share one copy of the model.
        element_bytes: of the dtype that computes: 2 or 4.
        micro_batch: sequences that a rank computes at once.
        accumulation: micro-batches in an optimizer step.
        bucket_elements, live_elements, reuse_elements, prefetch_elements, persistent_elements:
            of DeepSpeed's file.
        kernels: dtrain's own layers that stand in this model.
        learns_all: every token is learnt; where answers only are, the logits may be few.
        casts: computes under autocast where what trains is wider; dtrain always does.
        on_gpu: there torch's optimizer works on all parameters at once, with a copy of one; on a
            CPU gloo copies what it reduces and scatters.
    """

    shape: ModelShape
    method: str
    rank: int
    target_modules: str | tuple[str, ...]
    has_dropout: bool
    engine: str
    ranks: int
    node_ranks: int
    shard: int
    element_bytes: int
    sequence_length: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    optimizer: str = "adamw"
    offload: bool = False
    bucket_elements: int = BUCKET_ELEMENTS
    live_elements: int = LIVE_ELEMENTS
    reuse_elements: int = LIVE_ELEMENTS
    prefetch_elements: int = deepspeed_file.MAX_PREFETCHED
    persistent_elements: int = PERSISTENT_ELEMENTS
    on_gpu: bool = True
    kernels: frozenset[str] = frozenset()
    trains_on_all_tokens: bool = True
    casts: bool = True

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequence_length

    @property
    def step_tokens(self) -> int:
        """Of an optimizer step, over all ranks."""
        return self.tokens * self.accumulation * self.ranks

    @property
    def is_full(self) -> bool:
        """Every parameter trains."""
        return self.method == "full"

    @property
    def autocasts(self) -> bool:
        """torch's autocast computes in 16 bits; DeepSpeed casts the model itself."""
        return self.casts and self.element_bytes == 2 and self.engine not in ZERO

    @property
    def adapted(self) -> tuple[LinearShape, ...]:
        """Linear layers of a decoder layer that have an adapter."""
        return () if self.is_full else adapted(self.shape, self.target_modules)

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        if self.is_full:
            return self.shape.parameters
        return adapter_parameters(self.shape, self.rank, self.target_modules)

    @property
    def is_sharded(self) -> bool:
        """A rank holds a share of the base only."""
        return self.engine not in REPLICATED


def build_workload(
    recipe: Recipe, stage: Stage, shape: ModelShape, cluster: Cluster, engine: str | None = None
) -> Workload:
    """The stage of a recipe on a cluster.

    Args:
        engine: instead of the recipe's; `auto` is ddp, as without a plan.

    Raises:
        UserError: a target that no layer answers to, a shard that does not divide the ranks, a
            DeepSpeed file that cannot be read.
    """
    kind = engine or ("ddp" if recipe.engine.kind == "auto" else recipe.engine.kind)
    method, micro = stage.method, stage.train.micro_batch
    lora = method if isinstance(method, Lora) else None
    target_modules: str | tuple[str, ...] = "all-linear"
    if lora is not None and not isinstance(lora.target_modules, str):
        target_modules = tuple(lora.target_modules)
    on_cpu = recipe.device == "cpu"
    wide = recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and on_cpu)
    return Workload(
        shape=shape,
        method=method.kind,
        rank=lora.r if lora else 0,
        target_modules=target_modules,
        has_dropout=bool(lora and lora.dropout),
        engine=kind,
        ranks=cluster.ranks,
        node_ranks=cluster.gpus_per_node,
        shard=_shard(recipe, kind, cluster),
        element_bytes=4 if wide else 2,
        sequence_length=stage.data.sequence_length,
        micro_batch=micro,
        accumulation=max(1, stage.train.global_batch_size // (cluster.ranks * micro)),
        checkpointing=recipe.model.gradient_checkpointing,
        optimizer=stage.train.optimizer,
        offload=recipe.engine.offload and kind == "zero3",
        on_gpu=not on_cpu,
        trains_on_all_tokens=not OBJECTIVES[stage.kind].trains_on_answers,
        kernels=KERNELS[shape.kind] if recipe.model.kernels == "auto" else frozenset(),
        **{
            "prefetch_elements": deepspeed_file.prefetch_elements(shape.hidden),
            **_ds_sizes(recipe, kind),
        },
    )


def _shard(recipe: Recipe, kind: str, cluster: Cluster) -> int:
    if kind in REPLICATED:
        return 1
    wanted: Any = recipe.engine.shard if kind == "fsdp2" else "all"
    if recipe.engine.kind == "auto" and kind == "fsdp2":
        wanted = "node"  # what `auto` would choose: frozen weights never cross nodes
    group = {"all": cluster.ranks, "node": cluster.gpus_per_node}.get(str(wanted)) or int(wanted)
    if cluster.ranks % group:
        what = f"{cluster.ranks} ranks do not divide into groups of {group}"
        raise UserError(what, where="engine.shard", fix="a divisor of the ranks, node or all")
    return group


DS_KEYS = {
    "bucket_elements": "reduce_bucket_size",
    "live_elements": "stage3_max_live_parameters",
    "reuse_elements": "stage3_max_reuse_distance",
    "prefetch_elements": deepspeed_file.PREFETCH,
    "persistent_elements": "stage3_param_persistence_threshold",
}


def _ds_sizes(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Sizes of buckets from the recipe's own DeepSpeed file."""
    if kind not in ZERO or recipe.engine.kind != kind or recipe.engine.config is None:
        return {}
    path = Path(recipe.engine.config).expanduser()
    zero = deepspeed_file.read(path, kind, recipe.engine.offload).get("zero_optimization", {})
    found = {name: zero.get(key) for name, key in DS_KEYS.items()}
    numbers = {k: v for k, v in found.items() if isinstance(v, int | float)}  # others: "auto"
    return {name: int(value) for name, value in numbers.items() if 0 < value < MOST_ELEMENTS}
