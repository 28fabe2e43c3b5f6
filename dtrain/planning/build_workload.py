"""The workload of a recipe's stage: what its keys mean for memory, time and communication."""

from __future__ import annotations

from typing import Any

from dtrain.config import deepspeed_file
from dtrain.config.engines import DEFAULT_ENGINE, ENGINES, EngineCapabilities
from dtrain.config.objectives import OBJECTIVES, Forwards
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import user_path
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import UserError
from dtrain.planning.check_methods import check_adapter
from dtrain.planning.kernel_table import ADAPTED_LAYERS, LOSS
from dtrain.planning.known_models import find_shape
from dtrain.planning.shapes import ModelShape
from dtrain.planning.workload import Cluster, Workload

MAX_ELEMENTS = 2**63  # a larger value in a DeepSpeed file is not a number of elements
DEEPSPEED_KEYS = {
    "bucket_elements": "reduce_bucket_size",
    "live_elements": "stage3_max_live_parameters",
    "reuse_elements": "stage3_max_reuse_distance",
    "prefetch_elements": deepspeed_file.PREFETCH,
    "persistent_elements": "stage3_param_persistence_threshold",
}


def build_workload(
    recipe: Recipe, stage: Stage, shape: ModelShape, cluster: Cluster, engine: str | None = None
) -> Workload:
    """The workload of a recipe's stage on a cluster.

    Args:
        engine: replaces the recipe's engine; by default `auto` becomes `DEFAULT_ENGINE`.

    Raises:
        UserError: a key of the method matches no layer, the shard does not divide the ranks, the
            DeepSpeed file cannot be read, or the teacher's shape is not known.
    """
    report = CheckReport()
    with report.collect(f"stages.{stage.name}", "."):
        if adapter := stage.method.adapter:
            check_adapter(adapter, shape)
    report.raise_errors()
    kind = engine or (DEFAULT_ENGINE if recipe.engine.kind == "auto" else recipe.engine.kind)
    micro_batch = stage.train.micro_batch
    on_cpu = recipe.device == "cpu"
    is_float32 = recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and on_cpu)
    accumulation = max(1, stage.train.global_batch_size // (cluster.ranks * micro_batch))
    passes = extra_forwards(stage, accumulation)
    return Workload(
        shape=shape,
        method=stage.method,
        engine=kind,
        ranks=cluster.ranks,
        node_ranks=cluster.gpus_per_node,
        shard=_shard_ranks(recipe, ENGINES[kind], cluster),
        element_bytes=4 if is_float32 else 2,
        sequence_length=stage.data.sequence_length,
        micro_batch=micro_batch,
        accumulation=accumulation,
        checkpointing=recipe.model.gradient_checkpointing,
        optimizer=stage.train.optimizer,
        offload=recipe.engine.offload and ENGINES[kind].offload,
        on_gpu=not on_cpu,
        trains_on_all_tokens=not OBJECTIVES[stage.kind].trains_on_answers,
        extra_forwards=passes.share,
        extra_runs=passes.runs,
        distills=stage.distill is not None or _holds_to_base(stage),
        kept_values=_kept_values(stage),
        teacher=_teacher(stage),
        stores_teacher=stage.distill is not None and stage.distill.top_k is not None,
        kernels=_kernels(recipe, stage, shape),
        new_tokens=len(recipe.model.tokens.words) if recipe.model.tokens else 0,
        **{
            "prefetch_elements": deepspeed_file.prefetch_elements(shape.hidden),
            **_deepspeed_limits(recipe, kind),
        },
    )


def _teacher(stage: Stage) -> ModelShape | None:
    """The shape of the other model that a stage distills from."""
    if stage.distill is None or stage.distill.teacher_folder is None:
        return None
    return find_shape(stage.distill.teacher_folder, f"stages.{stage.name}.distill.teacher")[0]


def _kernels(recipe: Recipe, stage: Stage, shape: ModelShape) -> frozenset[str]:
    """dtrain's layers that compute in a stage; no output layer with a copy has the chunked loss."""
    traits, adapter = stage.method.traits, stage.method.adapter
    known = shape.kernels if recipe.model.kernels == "auto" else frozenset()
    if traits.adds_adapter and not traits.has_kernel:
        known -= {ADAPTED_LAYERS}
    has_copy = any("lm_head".endswith(end) for end in (adapter.whole_modules if adapter else ()))
    return known - {LOSS} if has_copy else known


def _kept_values(stage: Stage) -> int:
    term = stage.regularize
    of_term = term.kept_values if term and stage.method.traits.trains_base else 0
    return stage.method.kept_values + of_term


def _holds_to_base(stage: Stage) -> bool:
    return stage.regularize is not None and stage.regularize.traits.needs_base


def extra_forwards(stage: Stage, accumulation: int) -> Forwards:
    """Forward passes of a step without a backward pass: the objective's and the terms'."""
    replay, term, distill = stage.data.replay, stage.regularize, stage.distill
    traits = OBJECTIVES[stage.kind]
    passes = [traits.own_forwards]
    if not stage.stores_reference:
        passes.append(traits.reference_forwards)
    if distill is not None and distill.teacher_folder is None and distill.top_k is None:
        passes.append(Forwards(1.0, 1))
    if term and (share := term.extra_forwards(replay.ratio if replay else 0.0)):
        passes.append(Forwards(share, 1))
    if stage.method.trains_router and accumulation > 1:  # counts what the routers choose
        passes.append(Forwards(1.0, 1))
    return Forwards(sum(p.share for p in passes), sum(p.runs for p in passes))


def _shard_ranks(recipe: Recipe, engine: EngineCapabilities, cluster: Cluster) -> int:
    """Ranks that share one copy of the base."""
    if not engine.shards_base:
        return 1
    shard: str | int = recipe.engine.shard if engine.shard_group else "all"
    if recipe.engine.kind == "auto" and engine.shard_group:
        shard = "node"  # what `auto` would choose: frozen weights never cross nodes
    ranks = {"all": cluster.ranks, "node": cluster.gpus_per_node}.get(str(shard)) or int(shard)
    if cluster.ranks % ranks:
        raise UserError(
            f"{cluster.ranks} ranks do not divide into groups of {ranks}",
            where="engine.shard",
            fix="a divisor of the ranks, node or all",
        )
    return ranks


def _deepspeed_limits(recipe: Recipe, kind: str) -> dict[str, Any]:
    """Limits that the recipe's own DeepSpeed file sets; "auto" leaves the default."""
    if not ENGINES[kind].is_deepspeed:
        return {}
    if recipe.engine.kind != kind or recipe.engine.config is None:
        return {}
    path = user_path(recipe.engine.config)
    zero = deepspeed_file.read(path, kind, recipe.engine.offload).get("zero_optimization", {})
    values = {name: zero.get(key) for name, key in DEEPSPEED_KEYS.items()}
    return {
        name: int(value)
        for name, value in values.items()
        if isinstance(value, int | float) and 0 < value < MAX_ELEMENTS
    }
