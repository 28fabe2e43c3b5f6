"""Training engines and their capabilities: the one table that checks, planning and docs read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EngineKind = Literal["ddp", "fsdp2", "zero2", "zero3"]
DEFAULT_ENGINE: EngineKind = "ddp"
"""The engine of `engine.kind: auto` where neither the launcher nor the plan chooses one."""


@dataclass(frozen=True)
class EngineCapabilities:
    """What an engine can do, and what each rank stores under it.

    Attributes:
        title: the engine's full name.
        use_case: when to choose it, for the documentation.
        implementation: "module:class" of its `dtrain.engines.base.Engine`.
        memory_model: "module:class" of the `dtrain.planning.engine_base.EngineModel` that the plan
            uses; an engine that stores and sends the same as another one may share its model.
        strict_implementation: "module:class" of its variant for `determinism: strict`, whose
            weights do not depend on the number of ranks; None if it has none.
        shards_base: each rank stores a share of the base model's weights and the engine takes the
            model block by block; otherwise each rank stores all of them.
        shards_gradients: each rank keeps a share of the reduced gradients.
        shards_optimizer: each rank keeps a share of the optimizer state and its float32 weights.
        shard_group: `engine.shard` sets how many ranks share one copy of the model; the copies
            are replicas of each other.
        offload: `engine.offload` keeps parameters and optimizer state in host memory.
        whole_parameters: each rank updates whole parameters, as some optimizers need.
        zero_stage: DeepSpeed's ZeRO stage; None if the engine is not DeepSpeed's. DeepSpeed
            engines read a JSON file (`engine.config` or ds_configs/), cast the model instead of
            using autocast, and keep float32 master weights.
        shared_layers: supports models in which several decoder layers share weights.
        copies_layer_inputs: its module hooks pass copies of the inputs on, from which dtrain's
            kernels cannot recompute what they did not save.
        simulated: `dtrain plan --exact` can simulate it.
    """

    title: str
    use_case: str
    implementation: str
    memory_model: str
    strict_implementation: str | None = None
    shards_base: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    shard_group: bool = False
    offload: bool = False
    whole_parameters: bool = False
    zero_stage: int | None = None
    shared_layers: bool = True
    copies_layer_inputs: bool = False
    simulated: bool = False

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed implements the engine, configured by a JSON file."""
        return self.zero_stage is not None

    @property
    def strict(self) -> bool:
        """Whether the engine supports `determinism: strict`."""
        return self.strict_implementation is not None


ENGINES: dict[str, EngineCapabilities] = {
    "ddp": EngineCapabilities(
        title="torch DistributedDataParallel",
        use_case="adapters on a model that fits on each GPU",
        implementation="dtrain.engines.ddp:Ddp",
        memory_model="dtrain.planning.engine_models:DdpModel",
        strict_implementation="dtrain.engines.ddp:StrictDdp",
        whole_parameters=True,
        simulated=True,
    ),
    "fsdp2": EngineCapabilities(
        title="torch fully_shard",
        use_case="adapters or full fine-tuning of a model that does not fit on each GPU",
        implementation="dtrain.engines.fsdp2:Fsdp2",
        memory_model="dtrain.planning.engine_models:Fsdp2Model",
        shards_base=True,
        shards_gradients=True,
        shards_optimizer=True,
        shard_group=True,
        shared_layers=False,
        simulated=True,
    ),
    "zero2": EngineCapabilities(
        title="DeepSpeed ZeRO-2",
        use_case="full fine-tuning of a model that fits on each GPU",
        implementation="dtrain.engines.deepspeed:Zero2",
        memory_model="dtrain.planning.engine_models:Zero2Model",
        shards_gradients=True,
        shards_optimizer=True,
        zero_stage=2,
    ),
    "zero3": EngineCapabilities(
        title="DeepSpeed ZeRO-3",
        use_case="full fine-tuning of a model that does not fit on each GPU",
        implementation="dtrain.engines.deepspeed:Zero3",
        memory_model="dtrain.planning.engine_models:Zero3Model",
        shards_base=True,
        shards_gradients=True,
        shards_optimizer=True,
        offload=True,
        zero_stage=3,
        copies_layer_inputs=True,
    ),
}
assert tuple(ENGINES) == get_args(EngineKind)


def engines_with(capability: str) -> list[str]:
    """The kinds of the engines that have a capability, by its field name in the table."""
    return [kind for kind, engine in ENGINES.items() if getattr(engine, capability)]
