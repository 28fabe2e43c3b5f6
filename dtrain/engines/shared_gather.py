"""FSDP2's all-gather between the CPU ranks of one node, through memory that they share.

gloo sends every byte through sockets into memory that is new at each gather. NCCL would do neither,
and a step on CPUs would tell little of one on GPUs. Here each rank copies its shard to its place in
a buffer that all ranks have mapped, and a collective of one number says that all of them have;
hooks, shards and copies out stay torch's.
"""

from __future__ import annotations

import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from dtrain.distributed.world import World

BUFFERS = 3
KEY_BYTES = 8


def share_gathers(model: nn.Module, group: dist.ProcessGroup, world: World) -> None:
    """Gather a sharded model through shared memory, if the ranks of `group` are on one node."""
    if world.device.type != "cpu" or dist.get_backend(group) != "gloo" or group.size() == 1:
        return
    first_on_node = world.rank - world.local_rank
    is_near = dist.get_process_group_ranks(group)[0] >= first_on_node
    if shared_buffer(mmap.PAGESIZE, group, is_near=is_near) is None:
        return
    gather = SharedGather(group)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)


class SharedGather(AllGather):
    """Three buffers in turn; all ranks ask for the same sizes in the same order, as FSDP2 does.

    Who writes into a buffer must know that no rank still reads what was gathered there. Gather n
    takes the buffer of n - 3; every rank has by then entered the collective of n - 1. So it is
    enough that each had done with n - 3 when it entered, which it knows by what is still held.
    Otherwise, as when a backward pass prefetches what it does not use, gather n is an ordinary one.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._buffers: list[Tensor | None] = [None] * BUFFERS
        self._held: list[weakref.ref[Tensor] | None] = [None] * BUFFERS
        self._number = 0
        self._is_free = True
        self._is_shared = False

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Room for what is gathered: shared, or this rank's own."""
        needed = int(prod(size)) * dtype.itemsize
        room = self._shared(needed) if self._is_free else None
        self._is_shared = room is not None
        if room is None:
            room = torch.empty(needed, dtype=torch.uint8)
        result = room.view(dtype).view(*size)
        self._held[self._number % BUFFERS] = weakref.ref(result)
        return result

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Return when every rank has written its part."""
        self._number += 1
        last = self._held[self._number % BUFFERS]  # who had the buffer that is next
        self._is_free = last is None or last() is None
        if self._is_shared:
            dist.all_reduce(torch.zeros(1), group=self._group)
        else:
            dist.all_gather_single(output_tensor, input_tensor, group=self._group)

    def _shared(self, size: int) -> Tensor | None:
        place = self._number % BUFFERS
        buffer = self._buffers[place]
        if buffer is None or buffer.numel() < size:
            largest = max(size, *(b.numel() for b in self._buffers if b is not None), 0)
            buffer = self._buffers[place] = shared_buffer(largest, self._group)
        return None if buffer is None else buffer[:size]


def shared_buffer(size: int, group: dist.ProcessGroup, *, is_near: bool = True) -> Tensor | None:
    """uint8 [size] that every rank of `group` has mapped; None if one of them cannot.

    Args:
        is_near: whether this rank is on the node of the first.
    """
    first = dist.get_process_group_ranks(group)[0]
    file = _create(size) if dist.get_rank() == first else None
    found = torch.tensor(file or (0, 0, 0))
    dist.broadcast(found, first, group=group)
    process, number, key = found.tolist()
    buffer = None
    if is_near and process:
        with suppress(OSError, ValueError):  # not this node's, or another user's
            buffer = _map(f"/proc/{process}/fd/{number}", size, key)
    have_all = torch.tensor([buffer is not None], dtype=torch.int64)
    dist.all_reduce(have_all, dist.ReduceOp.MIN, group=group)
    if file:
        os.close(number)
    return buffer if have_all.item() else None


def _create(size: int) -> tuple[int, int, int] | None:
    """This process, a file in memory that it has open, and what the file begins with."""
    key = secrets.randbits(63)
    with suppress(OSError, AttributeError):  # no Linux
        file = os.memfd_create("dtrain-gather")
        os.truncate(file, max(size, KEY_BYTES))
        os.pwrite(file, key.to_bytes(KEY_BYTES, "little"), 0)
        return os.getpid(), file, key
    return None


def _map(path: str, size: int, key: int) -> Tensor | None:
    """The file at `path` as a tensor; None if it is another than that with `key`."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(file, size)
    finally:
        os.close(file)
    if int.from_bytes(memory[:KEY_BYTES], "little") != key:
        return None
    return torch.frombuffer(memory, dtype=torch.uint8)
