"""Check that an all-reduce works on all ranks: `… -m dtrain.distributed.all_reduce_check DEVICE`.

Each rank prints a line when it has imported what it needs. The first rank prints the bus bandwidth
of an all-reduce within a node and over all nodes; a rank with a wrong sum prints its node's name.
All lines are JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dtrain.core.errors import Exit
from dtrain.core.processes import exit_at_once
from dtrain.distributed.world import World, end_world, start_world

GPU_BYTES, CPU_BYTES = 256 << 20, 8 << 20
ROUNDS = 3


def main(argv: list[str] | None = None) -> int:
    """Check this rank."""
    device = (sys.argv[1:] if argv is None else argv)[0]
    print(json.dumps({"up": node_name()}), flush=True)  # before anything that may hang
    world = start_world(device)
    speeds, is_right = {}, True
    for where, group in groups(world):
        speed, right = all_reduce(world, group)
        speeds[where], is_right = round(speed / 1e9, 3), is_right and right
    if not is_right:
        print(json.dumps({"wrong": node_name()}), flush=True)
    if world.is_first:
        print(json.dumps({"gigabytes_per_second": speeds}), flush=True)
    end_world()
    return 0


def groups(world: World) -> Iterator[tuple[str, dist.ProcessGroup | None]]:
    """The group of this rank's node, if there are several nodes, and the group of all ranks."""
    starts = range(0, world.size, world.local_size)
    if world.local_size > 1 and len(starts) > 1:
        node_group = None
        for start in starts:
            group = dist.new_group(list(range(start, start + world.local_size)))
            node_group = group if start <= world.rank < start + world.local_size else node_group
        yield "inside a node", node_group
    yield "over all ranks", None


def all_reduce(world: World, group: dist.ProcessGroup | None) -> tuple[float, bool]:
    """Bus bandwidth (bytes a second, as nccl-tests count it), and whether the sums were right."""
    count = (GPU_BYTES if world.device.type == "cuda" else CPU_BYTES) // 4
    ranks, right, best = dist.get_world_size(group), True, float("inf")
    expected = float(sum(range(1, ranks + 1)))
    for _ in range(ROUNDS):
        values = torch.full((count,), float(dist.get_rank(group) + 1), device=world.device)
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_reduce(values, group=group)
        right = right and bool((values == expected).all())  # waits for the GPU too
        best = min(best, time.perf_counter() - started)
    return 2 * (ranks - 1) / ranks * count * 4 / best, right


def node_name() -> str:
    """This node as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        # Python's normal exit may, under NCCL, wait for ranks that are in a collective.
        traceback.print_exc()
        exit_at_once(Exit.CRASHED)
    sys.exit(status)
