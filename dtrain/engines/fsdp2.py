"""fsdp2: parameters sharded by torch's `fully_shard`, inside groups of `engine.shard` ranks.

Between groups the model is replicated (hybrid sharding): only gradients of what trains travel
there, so frozen weights never cross nodes with `shard: node`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dtrain.checkpoints.parameter_shards import ParameterShard
from dtrain.config.engines import engines_with
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.base import (
    MaterializeFn,
    TorchEngine,
    materialize_blocks,
)
from dtrain.engines.optimizers import build_optimizer
from dtrain.engines.shared_gather import share_gathers
from dtrain.models.decoder_layers import decoder_layers


class Fsdp2(TorchEngine):
    """torch's fully_shard, one group of parameters a decoder layer."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        stage: Stage,
        world: World,
        materialize: MaterializeFn,
    ) -> None:
        super().__init__(module, recipe, stage, world)
        check_blocks(decoder_layers(module))
        mesh = build_mesh(recipe.engine.shard, world)
        for block in materialize_blocks(module, materialize):
            fully_shard(block, mesh=mesh, mp_policy=self.precision())
        assert isinstance(module, FSDPModule)
        self.model, self.shard_group = module, mesh.get_group("shard")
        share_gathers(module, self.shard_group, world)
        if mesh.ndim > 1:
            self.replica = (mesh.get_local_rank("replicate"), mesh.size(0))
        # An adapter's unsharded gradient is small enough to be reduced once a step.
        self.reduce_every_micro_batch = stage.method.trains_whole_modules
        self.reduces = True
        self.optimizer = build_optimizer(self.trainable_names, self.local_params, stage, module)
        unsharded = [n for n, p in module.named_parameters() if not isinstance(p, DTensor)]
        assert not unsharded, f"not sharded: {unsharded[:3]}"

    @property
    def uses_autocast(self) -> bool:
        return super().uses_autocast and not self.stage.method.traits.trains_base

    def precision(self) -> MixedPrecisionPolicy:
        """Full fine-tuning gathers its float32 weights in the compute dtype.

        An adapter's weights are small, and its frozen base is in the compute dtype already.
        """
        if self.uses_autocast or self.compute_dtype == torch.float32:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(self.compute_dtype, reduce_dtype=torch.float32)

    @cached_property
    def local_params(self) -> list[nn.Parameter]:
        """This rank's shards as plain tensors, which share memory with the model's.

        With DTensors torch plans the sharding of each optimizer operation, which costs the first
        step seconds for some hundred adapters.
        """
        return [nn.Parameter(_local(p)) for _, p in self.trainable]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        reduces = last or self.reduce_every_micro_batch
        if reduces != self.reduces:  # the call walks over all modules
            self.model.set_requires_gradient_sync(reduces)
            self.reduces = reduces
        loss.backward()

    def step(self, learning_rate: float) -> float:
        self._take_gradients()
        return super().step(learning_rate)

    def _take_gradients(self) -> None:
        """Move the model's gradients to `local_params`."""
        for (_, parameter), local in zip(self.trainable, self.local_params, strict=True):
            if parameter.grad is not None:
                local.grad, parameter.grad = _local(parameter.grad), None

    def norm_over_ranks(self, norm: Tensor) -> Tensor:
        squares = norm.square()
        dist.all_reduce(squares, group=self.shard_group)
        return squares.sqrt()

    def on_weights_changed(self) -> None:
        # After an evaluation the root module's parameters are still gathered.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def parameter_shards(self, *, gradients: bool = False) -> Iterator[ParameterShard]:
        if gradients:
            self._take_gradients()
        self.on_weights_changed()  # or those of the root module would be what was gathered
        yield from super().parameter_shards(gradients=gradients)

    def flat_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        assert isinstance(parameter, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        row_elements = prod(parameter.shape[1:])
        start = offset[0] * row_elements
        return start, start + shape[0] * row_elements


def shard_frozen(
    model: nn.Module, materialize: MaterializeFn, shard: str | int, world: World
) -> None:
    """Shard the decoder layers of a model that only computes forward, under any engine.

    What is outside of the layers stays whole: the loss reads the output matrix after the model's
    forward pass.

    Args:
        shard: as `engine.shard`.
    """
    check_blocks(decoder_layers(model))
    mesh = build_mesh(shard, world)
    for block in materialize_blocks(model, materialize):
        whole = {p for p in block.parameters() if not isinstance(p, DTensor)}
        fully_shard(block, mesh=mesh, ignored_params=whole if block is model else None)


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    with torch.no_grad():  # otherwise torch records the conversion for autograd
        return tensor.to_local()


def check_blocks(blocks: list[nn.Module]) -> None:
    """Check that blocks share no weights: each is gathered and freed with one block only.

    Raises:
        UserError: some do.
    """
    owners: dict[nn.Parameter, nn.Module] = {}
    for block in blocks:
        for parameter in block.parameters():
            if owners.setdefault(parameter, block) is not block:
                raise UserError(
                    f"layers of this model share weights ({type(block).__name__}), which fsdp2 "
                    "cannot shard layer by layer",
                    where="engine.kind: fsdp2",
                    fix=f"engine.kind: {', '.join(engines_with('shared_layers'))}",
                )


def build_mesh(shard: str | int, world: World) -> DeviceMesh:
    """A mesh of one dimension ("shard") over all ranks, or two ("replicate" x "shard").

    Raises:
        UserError: the number of ranks is not a multiple of `shard`.
    """
    group = {"all": world.size, "node": world.local_size}.get(str(shard)) or int(shard)
    if world.size % group:
        divisors = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise UserError(
            f"{world.size} ranks do not divide into groups of {group}",
            where="engine.shard",
            fix=f"one of {divisors}",
        )
    kind = world.device.type
    if group == world.size:
        return init_device_mesh(kind, (group,), mesh_dim_names=("shard",))
    names = ("replicate", "shard")
    return init_device_mesh(kind, (world.size // group, group), mesh_dim_names=names)
