"""zero2 and zero3: DeepSpeed's ZeRO (arXiv:1910.02054), configured by a file of ds_configs/."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from pydantic import ValidationError
from torch import Tensor, nn

from dtrain.checkpoints.parameter_shards import GRADIENT, ParameterShard
from dtrain.config.checks import accumulation
from dtrain.config.deepspeed_file import PREFETCH, load_ds_config, prefetch_elements
from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError, first_line
from dtrain.distributed.world import World
from dtrain.engines.base import (
    Engine,
    MaterializeFn,
    materialize_blocks,
)
from dtrain.engines.optimizers import (
    build_optimizer,
    set_update_count,
    state_tensors,
    with_average,
)
from dtrain.engines.shared_gather import shared_gather
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.token_rows import token_layers

_ORIGINAL_ALL_GATHER = partition_parameters._dist_allgather_fn


class Zero(Engine):
    """Base of both ZeRO stages."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        stage: Stage,
        world: World,
        materialize: MaterializeFn,
    ) -> None:
        super().__init__(module, recipe, stage, world)
        start_deepspeed(world)
        options = recipe.engine
        file = Path(options.config) if options.config else None
        file_settings = load_ds_config(file, options.kind, options.offload)
        settings = fill_ds_config(file_settings, recipe, stage, world, dtype=self.compute_dtype)
        if file is not None:
            check_ds_config(settings, file)
        self.prepare_module(settings, materialize)
        parameters = [p for _, p in self.trainable]
        optimizer = build_optimizer(self.trainable_names, parameters, stage, module)
        with short_parameter_repr():
            self.model, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings
            )
        assert self.model.zero_optimization_stage() == ENGINES[recipe.engine.kind].zero_stage
        assert self.model.dp_world_size == world.size
        self.zero = self.model.optimizer

    def prepare_module(self, settings: dict[str, Any], materialize: MaterializeFn) -> None:
        """Load the model before `deepspeed.initialize`."""
        materialize(self.module)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        self.begin_update(self.model.optimizer, learning_rate)
        self.model.step()
        if self.zero.overflow:  # the norm is not finite, and DeepSpeed skipped the update
            return float("inf")
        self.count_update(learning_rate)
        return float(self.model.get_global_grad_norm())

    @property
    def updated(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        return self.zero.optimizer, self.flat_masters()

    def on_state_loaded(self, update_count: int, rate_square_sum: float = 0.0) -> None:
        super().on_state_loaded(update_count, rate_square_sum)
        for flat in self.flat_masters():
            set_update_count(self.zero.optimizer, flat, update_count)

    def ds_params(self) -> list[tuple[str, Any]]:
        """Trainable parameters, untyped because of the attributes that DeepSpeed adds."""
        return list(self.trainable)

    def state_of(self, flat: Tensor) -> dict[str, Tensor]:
        """The optimizer's tensors of a flat master, by their kind in a checkpoint."""
        return state_tensors(self.zero.optimizer, flat, self.stage)

    @abstractmethod
    def flat_masters(self) -> list[Tensor]:
        """The float32 master weights that DeepSpeed's inner optimizer updates, flattened."""

    def close(self) -> None:
        self.model.destroy()
        super().close()


class Zero2(Zero):
    """Gradients and optimizer state are partitioned as ranges of all parameters, concatenated."""

    def flat_masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def on_weights_changed(self) -> None:
        self.zero.update_lp_params()  # what computes is a copy of the masters

    def parameter_shards(self, *, gradients: bool = False) -> Iterator[ParameterShard]:
        masters = self.flat_masters()
        for name, parameter in self.ds_params():
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is in other ranks' partitions
                yield ParameterShard(name, tuple(parameter.shape), 0, 0, {})
                continue
            master = masters[mapping.param_group_index]
            flat = {"weight": master.data, **({} if gradients else self.state_of(master))}
            in_master, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            tensors = {k: v.narrow(0, in_master.start, in_master.numel) for k, v in flat.items()}
            start, stop = in_parameter.start, in_parameter.start + in_parameter.numel
            if gradients:
                gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
                is_whole = gradient.numel() == parameter.numel()
                tensors[GRADIENT] = gradient[start:stop] if is_whole else gradient
            shape = tuple(parameter.shape)
            yield ParameterShard(name, shape, start, stop, with_average(tensors))


class Zero3(Zero):
    """Parameters are partitioned too: each rank has an equal range of every parameter."""

    def prepare_module(self, settings: dict[str, Any], materialize: MaterializeFn) -> None:
        share_partitions(self.world)
        zero = settings["zero_optimization"]
        if zero.get(PREFETCH, "auto") == "auto":
            config: Any = self.module.config
            zero[PREFETCH] = prefetch_elements(config.get_text_config().hidden_size)
        offload_device = "cpu" if self.recipe.engine.offload else None
        for block in materialize_blocks(self.module, materialize):
            cast_parameters(block, self.compute_dtype)
            if block is not self.module:  # deepspeed.initialize partitions the rest
                deepspeed.zero.Init(
                    module=block,
                    config_dict_or_path=settings,
                    dtype=self.compute_dtype,
                    remote_device=offload_device,
                    mem_efficient_linear=False,
                )

        for block in decoder_layers(self.module):
            # Kernels read the weights of several linear layers at once: gather the whole block.
            for parameter in block.parameters():
                deepspeed.zero.register_external_parameter(block, parameter)
        for name, _ in token_layers(self.module):
            wrapper = self.module.get_submodule(name)  # it reads the weights of its children
            for parameter in wrapper.parameters():
                deepspeed.zero.register_external_parameter(wrapper, parameter)

    def on_weights_changed(self) -> None:
        self.zero._partition_all_parameters()  # the small ones, which stay gathered between steps
        # The compute copies are made from the masters.
        for group in range(len(self.flat_masters())):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)

    def flat_masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def parameter_shards(self, *, gradients: bool = False) -> Iterator[ParameterShard]:
        masters = self.flat_masters()
        for name, parameter in self.ds_params():
            group, offset, elements = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = min(self.world.rank * elements, parameter.ds_numel)
            stop = min(start + elements, parameter.ds_numel)  # the last range is padded
            state = {} if gradients else self.state_of(masters[group])
            flat = {"weight": masters[group].data, **state}
            tensors = {k: v.narrow(0, offset, stop - start) for k, v in flat.items()}
            if gradients:
                gradient, _ = self.zero._get_fp32_grad_state_partition(parameter, False)
                tensors[GRADIENT] = gradient[: stop - start]
            shape = tuple(parameter.ds_shape)
            yield ParameterShard(name, shape, start, stop, with_average(tensors))


def cast_parameters(block: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that DeepSpeed has not partitioned yet to the compute dtype.

    DeepSpeed casts a model only if none of its parameters is partitioned: without this, ZeRO-3
    would keep and compute in float32 what was loaded in float32, whatever `bf16.enabled` says.
    The optimizer makes its own float32 masters.
    """
    for parameter in block.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)


def share_partitions(world: World) -> None:
    """Make ZeRO-3 gather through shared memory where `shared_gather` supports it."""
    assert dist.group.WORLD
    gather = shared_gather(dist.group.WORLD, world)
    partition_parameters._dist_allgather_fn = _ORIGINAL_ALL_GATHER
    if gather is None:
        return

    def gather_partitions(shard: Tensor, output: Tensor, group: object = None) -> CompletedWork:
        gather.into(shard.flatten(), output)
        return CompletedWork()

    partition_parameters._dist_allgather_fn = gather_partitions


class CompletedWork:
    """The handle of a collective that is complete."""

    def wait(self, **_: object) -> None:
        """Return at once."""


def start_deepspeed(world: World) -> None:
    """Initialize DeepSpeed with the existing process group.

    On a CPU, gloo carries all collectives: DeepSpeed's shared-memory collectives are a C++
    extension that takes a minute to compile at the first start.
    """
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@contextmanager
def short_parameter_repr() -> Iterator[None]:
    """Represent a parameter by its shape only.

    DeepSpeed formats every parameter for a log line that is never shown. That is slow, and it
    sometimes raised an error inside torch's formatting when ZeRO-3 started.
    """
    original = nn.Parameter.__repr__
    nn.Parameter.__repr__ = _shape_only  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Parameter.__repr__ = original  # type: ignore[assignment,method-assign]


def check_ds_config(settings: dict[str, Any], file: Path) -> None:
    """Check that DeepSpeed takes the settings of a person's file.

    Raises:
        UserError: it does not.
    """
    try:
        deepspeed.DeepSpeedConfig(deepcopy(settings))
    except Exception as error:  # of any type, as DeepSpeed looks at few types itself
        message = first_line(error)
        if isinstance(error, ValidationError):
            detail = error.errors()[0]
            message = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        raise UserError(f"DeepSpeed refuses it: {message}", where=str(file)) from error


def _shape_only(parameter: nn.Parameter) -> str:
    return f"Parameter{tuple(parameter.shape)}"


def fill_ds_config(
    settings: dict[str, Any], recipe: Recipe, stage: Stage, world: World, dtype: torch.dtype
) -> dict[str, Any]:
    """Replace "auto" by the recipe's values."""
    train = stage.train
    micro = train.micro_batch
    explicit = {key: value for key, value in settings.items() if value != "auto"}
    bf16 = {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True}
    return explicit | {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation(train.global_batch_size, world.size, micro),
        "gradient_clipping": train.max_grad_norm,
        "bf16": settings.get("bf16", {}) | bf16,
    }
