"""zero2 and zero3: DeepSpeed's ZeRO (arXiv:1910.02054), configured by a file of ds_configs/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor, nn

from dtrain.checkpoints.parameter_shards import ParameterShard
from dtrain.config.checks import accumulation
from dtrain.config.deepspeed_file import PREFETCH, prefetch_elements
from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe, Stage
from dtrain.distributed.world import World
from dtrain.engines.base import (
    ADAM_KINDS,
    Engine,
    Fill,
    adam_state,
    build_optimizer,
    decoder_layers,
    filled_blocks,
    set_learning_rate,
)
from dtrain.engines.shared_gather import shared_gather
from dtrain.launching.deepspeed_config import load_ds_config

_DEEPSPEEDS_OWN = partition_parameters._dist_allgather_fn


class Zero(Engine):
    """What both ZeRO stages share."""

    def __init__(
        self, bare: nn.Module, recipe: Recipe, stage: Stage, world: World, fill: Fill
    ) -> None:
        super().__init__(bare, recipe, stage, world)
        start_deepspeed(world)
        settings = fill_ds_config(
            load_ds_config(_own_file(recipe), recipe.engine.kind, recipe.engine.offload),
            recipe,
            stage,
            world,
            dtype=self.compute_dtype,
        )
        self.place(settings, fill)
        optimizer = build_optimizer([p for _, p in self.trainable], stage)
        with brief_parameters():
            self.model, *_ = deepspeed.initialize(model=bare, optimizer=optimizer, config=settings)
        assert self.model.zero_optimization_stage() == ENGINES[recipe.engine.kind].zero_stage
        assert self.model.dp_world_size == world.size
        self.zero = self.model.optimizer

    def place(self, settings: dict[str, Any], fill: Fill) -> None:
        """Fill the model before DeepSpeed takes it."""
        fill(self.bare)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        set_learning_rate(self.model.optimizer, learning_rate)
        self.model.step()
        if self.zero.overflow:  # DeepSpeed's word for a non-finite norm: it skipped the update
            return float("inf")
        self.updates += 1
        return float(self.model.get_global_grad_norm())

    def set_updates(self, updates: int) -> None:
        self.updates = updates
        for flat in self.flat_masters():
            adam_state(self.zero.optimizer, flat)["step"].fill_(updates)

    def marked(self) -> list[tuple[str, Any]]:
        """What trains, with the attributes that DeepSpeed puts on parameters."""
        return list(self.trainable)

    def flat_masters(self) -> list[Tensor]:
        """The float32 tensors that DeepSpeed's inner optimizer updates."""
        raise AssertionError("each stage has its own")

    def close(self) -> None:
        self.model.destroy()


class Zero2(Zero):
    """Gradients and optimizer state partitioned as ranges of all parameters laid end to end."""

    def flat_masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def pieces(self) -> Iterator[ParameterShard]:
        masters = self.flat_masters()
        for name, parameter in self.marked():
            mapping = parameter._hp_mapping
            if mapping is None:  # other ranks hold all of it
                yield ParameterShard(name, tuple(parameter.shape), 0, 0, {})
                continue
            master = masters[mapping.param_group_index]
            state = adam_state(self.zero.optimizer, master)
            flat = {"weight": master.data, **{kind: state[kind] for kind in ADAM_KINDS}}
            held, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
            tensors = {k: v.narrow(0, held.start, held.numel) for k, v in flat.items()}
            stop = whole.start + whole.numel
            yield ParameterShard(name, tuple(parameter.shape), whole.start, stop, tensors)


class Zero3(Zero):
    """Parameters partitioned too: each rank holds an equal range of every parameter."""

    def place(self, settings: dict[str, Any], fill: Fill) -> None:
        share_partitions(self.world)
        zero = settings["zero_optimization"]
        if zero.get(PREFETCH, "auto") == "auto":
            config: Any = self.bare.config
            zero[PREFETCH] = prefetch_elements(config.get_text_config().hidden_size)
        where = "cpu" if self.recipe.engine.offload else None
        for block in filled_blocks(self.bare, fill):
            cast_parameters(block, self.compute_dtype)
            if block is not self.bare:  # the rest is partitioned by DeepSpeed itself
                deepspeed.zero.Init(
                    module=block,
                    config_dict_or_path=settings,
                    dtype=self.compute_dtype,
                    remote_device=where,
                    mem_efficient_linear=False,
                )

        for block in decoder_layers(self.bare):
            # A kernel reads the weights of several layers at once: a block gathers all of its own.
            for parameter in block.parameters():
                deepspeed.zero.register_external_parameter(block, parameter)

    def restored(self) -> None:
        for group in range(len(self.flat_masters())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def flat_masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def pieces(self) -> Iterator[ParameterShard]:
        masters = self.flat_masters()
        for name, parameter in self.marked():
            group, offset, elements = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(self.world.rank * elements, parameter.ds_numel)
            stop = min(start + elements, parameter.ds_numel)  # the last range is padded
            state = adam_state(self.zero.optimizer, masters[group])
            flat = {"weight": masters[group].data, **{kind: state[kind] for kind in ADAM_KINDS}}
            tensors = {k: v.narrow(0, offset, stop - start) for k, v in flat.items()}
            yield ParameterShard(name, tuple(parameter.ds_shape), start, stop, tensors)


def cast_parameters(block: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that DeepSpeed has not partitioned yet to the compute dtype.

    DeepSpeed casts a model only if none of its parameters is partitioned: without this, ZeRO-3
    holds and computes in float32 what was loaded in float32, whatever `bf16.enabled` says. The
    float32 masters are the optimizer's own.
    """
    for parameter in block.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def share_partitions(world: World) -> None:
    """Let ZeRO-3 gather through shared memory where `shared_gather` can."""
    assert dist.group.WORLD
    gather = shared_gather(dist.group.WORLD, world)
    partition_parameters._dist_allgather_fn = _DEEPSPEEDS_OWN
    if gather is None:
        return

    def gather_partitions(part: Tensor, whole: Tensor, group: object = None) -> Done:
        gather.into(part.flatten(), whole)
        return Done()

    partition_parameters._dist_allgather_fn = gather_partitions


class Done:
    """A handle of what is done already."""

    def wait(self, **_: object) -> None:
        """Nothing to wait for."""


def start_deepspeed(world: World) -> None:
    """Let DeepSpeed use the process group that is there.

    On a CPU its shared-memory collectives, a C++ extension compiled for a minute at the first
    start, are left out: gloo carries everything.
    """
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def brief_parameters() -> Iterator[None]:
    """Print a parameter as its shape.

    DeepSpeed formats every parameter for a log line that nobody sees: slow, and seen to fail
    inside torch's printing in one of some ZeRO-3 starts.
    """
    original = nn.Parameter.__repr__
    nn.Parameter.__repr__ = _shape_only  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Parameter.__repr__ = original  # type: ignore[assignment,method-assign]


def _shape_only(parameter: nn.Parameter) -> str:
    return f"Parameter{tuple(parameter.shape)}"


def fill_ds_config(
    settings: dict[str, Any], recipe: Recipe, stage: Stage, world: World, dtype: torch.dtype
) -> dict[str, Any]:
    """Put the recipe's values where the file says "auto"."""
    train = stage.train
    micro = train.micro_batch
    kept = {knob: value for knob, value in settings.items() if value != "auto"}
    bf16 = {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True}
    return kept | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation(train.global_batch_size, world.size, micro),
        "gradient_clipping": train.max_grad_norm,
        "bf16": settings.get("bf16", {}) | bf16,
    }


def _own_file(recipe: Recipe) -> Path | None:
    return Path(recipe.engine.config) if recipe.engine.config else None
