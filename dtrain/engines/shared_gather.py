"""All-gathers of FSDP2 and ZeRO-3 through shared memory, between CPU ranks on one node.

gloo sends every byte through sockets into newly allocated memory. NCCL would do neither, so the
time of a step on CPUs would say little about a step on GPUs. Here each rank copies its shard into
a buffer that all ranks have mapped, and a collective of one number signals that all have done so.
Hooks, shards and the copies out of the buffer remain torch's.
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
    """Make an FSDP2 model gather through shared memory, if the ranks of `group` share a node."""
    gather = shared_gather(group, world)
    for module in model.modules():
        if isinstance(module, FSDPModule) and gather:
            module.set_custom_all_gather(gather)


def shared_gather(group: dist.ProcessGroup, world: World) -> SharedGather | None:
    """A shared gather for the CPU ranks of `group`; None if they are on several nodes."""
    if world.device.type != "cpu" or dist.get_backend(group) != "gloo" or group.size() == 1:
        return None
    first_on_node = world.rank - world.local_rank
    same_node = dist.get_process_group_ranks(group)[0] >= first_on_node
    if shared_buffer(mmap.PAGESIZE, group, same_node=same_node) is None:
        return None
    return SharedGather(group)


class SharedGather(DefaultAllGather):
    """All-gathers that take turns on three shared buffers.

    All ranks request the same sizes in the same order, as FSDP2 does. A rank may write into a
    buffer only if no rank still reads its last content. Gather n uses the buffer of gather n - 3,
    and in the collective of gather n - 1 each rank reports whether it still references that
    content. If one does, for example when a backward pass prefetches early, gather n is an
    ordinary one. Each buffer grows to the size of the largest gather, the embeddings', and stays.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._buffers: list[Tensor | None] = [None] * BUFFERS
        self._contents: list[weakref.ref[Tensor] | None] = [None] * BUFFERS
        self._index = 0  # of the next gather
        self._can_map, self._is_free, self._is_shared = True, True, False

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """An output tensor in a shared buffer if its turn is free, else in private memory."""
        needed = int(prod(size)) * dtype.itemsize
        memory = self._shared(needed) if self._can_map and self._is_free else None
        self._is_shared = memory is not None
        if memory is None:
            return super().allocate(size, dtype=dtype, device=device)
        result = memory.view(dtype).view(*size)
        self._contents[self._index % BUFFERS] = weakref.ref(result)
        return result

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Return when every rank has written its shard."""
        if not self._is_shared:
            super().__call__(output_tensor, input_tensor, group)
        self._index += 1
        content = self._contents[self._index % BUFFERS]
        in_use = torch.tensor([float(content is not None and content() is not None)])
        dist.all_reduce(in_use, group=group)
        self._is_free = not in_use.item()

    def into(self, shard: Tensor, output: Tensor) -> None:
        """Gather every rank's `shard` [n] into `output` [ranks x n]."""
        gathered = self.allocate(output.shape, dtype=output.dtype, device=output.device)
        offset = self._group.rank() * shard.numel()
        self(gathered, gathered.narrow(0, offset, shard.numel()).copy_(shard), self._group)
        output.copy_(gathered)

    def _shared(self, size: int) -> Tensor | None:
        index = self._index % BUFFERS
        buffer = self._buffers[index]
        if buffer is None or buffer.numel() < size:
            largest = max(size, *(b.numel() for b in self._buffers if b is not None), 0)
            buffer = self._buffers[index] = shared_buffer(largest, self._group)
            self._can_map = buffer is not None  # on all ranks or on none
        return None if buffer is None else buffer[:size]


def shared_buffer(size: int, group: dist.ProcessGroup, *, same_node: bool = True) -> Tensor | None:
    """A uint8 tensor of at least `size` bytes, mapped by all ranks of `group`; None if one cannot.

    Args:
        same_node: whether this rank is on the node of the group's first rank.
    """
    size = max(size, KEY_BYTES)
    first = dist.get_process_group_ranks(group)[0]
    file = _create(size) if dist.get_rank() == first else None
    address = torch.tensor(file or (0, 0, 0))
    dist.broadcast(address, first, group=group)
    process, descriptor, key = address.tolist()
    buffer = None
    if same_node and process:
        with suppress(OSError, ValueError):  # a process on another node, or of another user
            buffer = _map(f"/proc/{process}/fd/{descriptor}", size, key)
    have_all = torch.tensor([buffer is not None], dtype=torch.int64)
    dist.all_reduce(have_all, dist.ReduceOp.MIN, group=group)
    if file:
        os.close(descriptor)
    return buffer if have_all.item() else None


def _create(size: int) -> tuple[int, int, int] | None:
    """Create a file in memory; return this process, the file descriptor and the file's key."""
    if not hasattr(os, "memfd_create"):  # not Linux
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
    """The file at `path` as a tensor; None if it does not begin with `key`."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(file, size)
    finally:
        os.close(file)
    if int.from_bytes(memory[:KEY_BYTES], "little") != key:
        return None
    return torch.frombuffer(memory, dtype=torch.uint8)
