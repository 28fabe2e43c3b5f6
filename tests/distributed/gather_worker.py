"""Ranks that gather through shared memory; prints how often torch gathered instead.

Every gathered tensor is checked before it is freed. Ranks keep some of them longer than FSDP2 does,
and one rank is always late.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from count_bytes import batch, build
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.distributed.world import World, end_world, start_world
from dtrain.engines.shared_gather import SharedGather, share_gathers, shared_buffer
from dtrain.models.loss import target_losses

GREATEST = 40_000
# FSDP2 holds one gather while it asks for the next in a forward pass, none in a backward pass.
HELD = [0, 1, 1, 1, 1, 1, 1, 3]
CPU = torch.device("cpu")


def count_torchs(calls: list[int]) -> None:
    """Count torch's own gathers."""
    original = dist.all_gather_single

    def counted(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        return original(*args, **named)

    dist.all_gather_single = counted


def expected(number: int, size: int, ranks: int) -> Tensor:
    return torch.cat([torch.full((size,), number + rank / 8) for rank in range(ranks)])


def gathers(world: World, count: int) -> None:
    group = dist.group.WORLD
    gather, chance, held = SharedGather(group), random.Random(7), []
    for number in range(count):
        size = chance.randint(1, GREATEST)
        output = gather.allocate((size * world.size,), dtype=torch.float32, device=CPU)
        local_shard = output.narrow(0, size * world.rank, size).fill_(number + world.rank / 8)
        gather(output, local_shard, group)
        if world.rank == number % world.size:  # late: the others run ahead as far as they may
            sum(range(20_000))
        held.append((number, size, output))
        del output, local_shard
        while len(held) > chance.choice(HELD):
            then, length, gathered = held.pop(chance.randrange(len(held)))
            assert torch.equal(gathered, expected(then, length, world.size)), then
            del gathered

    for size in (5, GREATEST, 1):
        whole = torch.empty(size * world.size)
        gather.into(expected(9, size, world.size)[size * world.rank :][:size], whole)
        assert torch.equal(whole, expected(9, size, world.size))


def outputs_of_a_sharded_model(world: World) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(33, 33) for _ in range(4)))
    x = torch.randn(5, 33)
    plain = model(x)
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    for block in (*model, model):
        fully_shard(block, mesh=mesh)
    share_gathers(model, mesh.get_group("shard"), world)
    outputs = model(x)
    outputs.sum().backward()
    assert torch.allclose(outputs, plain)
    return outputs


def elements_of_zero3(world: World) -> tuple[int, int]:
    """What forward and backward gather through memory; what the model has."""
    sizes, into = list[int](), SharedGather.into

    def noted(self: SharedGather, shard: Tensor, whole: Tensor) -> None:
        sizes.append(whole.numel())
        into(self, shard, whole)

    SharedGather.into = noted
    engine, _, total = build("{kind: zero3}", world)
    engine.backward(target_losses(engine.model, batch())[0], last=True)
    return sum(sizes), total


def main(arguments: list[str]) -> int:
    world, calls, facts = start_world("cpu"), [0], dict[str, int]()
    count_torchs(calls)
    gathers(world, int(arguments[0]))
    facts["held too long"], calls[0] = calls[0], 0
    outputs_of_a_sharded_model(world)
    facts["one node"], calls[0] = calls[0], 0
    outputs_of_a_sharded_model(replace(world, local_rank=0))  # a node a rank
    facts["two nodes"] = calls[0]
    same_node = world.rank == 0
    facts["buffers"] = int(shared_buffer(64, dist.group.WORLD, same_node=same_node) is not None)
    facts["zero3 gathers"], facts["zero3 has"] = elements_of_zero3(world)
    assert world.sum(list(facts.values())) == [world.size * value for value in facts.values()]
    if world.is_first:
        print("FACTS " + json.dumps(facts), flush=True)
    end_world()
    return 0
