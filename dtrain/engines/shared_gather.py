"""All-gathers of FSDP2 and ZeRO-3 between the CPU ranks of one node, through shared memory.

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
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

from dtrain.distributed.world import World

BUFFERS = 3
KEY_BYTES = 8


def share_gathers(model: nn.Module, group: dist.ProcessGroup, world: World) -> None:
    """Gather a model of FSDP2 through shared memory, if the ranks of `group` are on one node."""
    gather = shared_gather(group, world)
    for module in model.modules():
        if isinstance(module, FSDPModule) and gather:
            module.set_custom_all_gather(gather)


def shared_gather(group: dist.ProcessGroup, world: World) -> SharedGather | None:
    """One for CPU ranks of `group`, if they are on one node."""
    if world.device.type != "cpu" or dist.get_backend(group) != "gloo" or group.size() == 1:
        return None
    first_on_node = world.rank - world.local_rank
    is_near = dist.get_process_group_ranks(group)[0] >= first_on_node
    if shared_buffer(mmap.PAGESIZE, group, is_near=is_near) is None:
        return None
    return SharedGather(group)


class SharedGather(DefaultAllGather):
    """Three buffers in turn; all ranks ask for the same sizes in the same order, as FSDP2 does.

    Who writes into a buffer must know that no rank still reads what was gathered there. Gather n
    takes the buffer of n - 3, and in the collective of n - 1 each rank says whether it still holds
    what lies there. If one does, as when a backward pass prefetches what it uses late, gather n is
    an ordinary one. Each buffer grows to the largest gather, that of the embeddings, and stays.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._buffers: list[Tensor | None] = [None] * BUFFERS
        self._held: list[weakref.ref[Tensor] | None] = [None] * BUFFERS  # what lies in each
        self._number = 0
        self._works, self._may_share, self._is_shared = True, True, False

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Room for what is gathered: shared, or this rank's own."""
        needed = int(prod(size)) * dtype.itemsize
        room = self._shared(needed) if self._works and self._may_share else None
        self._is_shared = room is not None
        if room is None:
            return super().allocate(size, dtype=dtype, device=device)
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
        if not self._is_shared:
            super().__call__(output_tensor, input_tensor, group)
        self._number += 1
        held = self._held[self._number % BUFFERS]
        is_held = torch.tensor([float(held is not None and held() is not None)])
        dist.all_reduce(is_held, group=group)
        self._may_share = not is_held.item()

    def into(self, part: Tensor, whole: Tensor) -> None:
        """Gather every rank's `part` [n] into `whole` [ranks x n]."""
        room = self.allocate(whole.shape, dtype=whole.dtype, device=whole.device)
        own = room.narrow(0, self._group.rank() * part.numel(), part.numel()).copy_(part)
        self(room, own, self._group)
        whole.copy_(room)

    def _shared(self, size: int) -> Tensor | None:
        place = self._number % BUFFERS
        buffer = self._buffers[place]
        if buffer is None or buffer.numel() < size:
            largest = max(size, *(b.numel() for b in self._buffers if b is not None), 0)
            buffer = self._buffers[place] = shared_buffer(largest, self._group)
            self._works = buffer is not None  # on all ranks or on none
        return None if buffer is None else buffer[:size]


def shared_buffer(size: int, group: dist.ProcessGroup, *, is_near: bool = True) -> Tensor | None:
    """uint8, at least `size` long, that every rank of `group` has mapped; None if one cannot.

    Args:
        is_near: whether this rank is on the node of the group's first.
    """
    size = max(size, KEY_BYTES)
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
    if not hasattr(os, "memfd_create"):  # no Linux
        return None
    key, file = secrets.randbits(63), os.memfd_create("dtrain-gather")
    try:
        os.truncate(file, size)
        os.pwrite(file, key.to_bytes(KEY_BYTES, "little"), 0)
    except OSError:
        os.close(file)
        return None
    return os.getpid(), file, key


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
