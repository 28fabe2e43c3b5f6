"""Process rank, device, and small CPU collectives."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from dtrain.core.errors import UserError
from dtrain.distributed.rendezvous import (
    LOOPBACK,
    is_loopback,
    rank_store,
    refuse_pickles,
    restrict_stores,
)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
NO_TIME_LIMIT = timedelta(days=30)
FIRST_IS_DONE = "dtrain/first_is_done"
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's rank and device, and the collectives of all ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # ranks on this node
    device: torch.device
    gloo_group: dist.ProcessGroup  # gloo, without a time limit

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files of the run."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64; every rank gets the same."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.gloo_group)
        return [float(v) for v in total]

    def sum_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum CPU tensors of one dtype over all ranks, in place."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.gloo_group)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def broadcast_text(self, text: str) -> str:
        """Return the first rank's `text` on every rank."""
        data = text.encode()
        length = torch.tensor([len(data)], dtype=torch.int64)
        dist.broadcast(length, 0, group=self.gloo_group)
        if not length.item():
            return ""
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.is_first:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, 0, group=self.gloo_group)
        return bytes(buffer.tolist()).decode()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every rank's `data`, in the order of the ranks, on all of them."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.gloo_group)
        longest = max(int(size) for size in sizes)
        own = torch.frombuffer(bytearray(data.ljust(longest + 1, b"\0")), dtype=torch.uint8)
        buffers = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(buffers, own, group=self.gloo_group)
        return [b[: int(n)].numpy().tobytes() for b, n in zip(buffers, sizes, strict=True)]

    def rank0_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the first rank, then on the others, which find its cached results.

        They wait on the rendezvous store: a collective would time out.
        """
        store = dist.distributed_c10d._get_default_store()
        if not self.is_first:
            store.wait([FIRST_IS_DONE], NO_TIME_LIMIT)
        result = work()
        if self.is_first:
            store.set(FIRST_IS_DONE, "1")
        return result

    def barrier(self) -> None:
        """Wait for every rank."""
        self.sum([0.0])


def start_world(device: str) -> World:
    """Join the process group that the launcher describes in the environment, if there is one.

    Args:
        device: "auto", "cpu" or "cuda" (recipe key `device`).
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    torch_device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(torch_device)
    if "RANK" not in os.environ:
        os.environ.update(_single_process_environment())
    restrict_stores()
    refuse_pickles()
    choose_interface()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = rank_store(rank, size, os.environ)
    if store is not None:
        store.set_timeout(COLLECTIVE_TIMEOUT)
    # gloo carries the CPU tensors of `World`; NCCL carries those of the model.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        store=store,
        rank=rank if store is not None else -1,
        world_size=size if store is not None else -1,
        # With `device_id` NCCL connects at once, which fails with a CUDA error for a single rank.
        device_id=torch_device if use_gpu and size > 1 else None,
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    # Work of a single rank, such as a merge of 70B, takes longer than a collective's time limit.
    # A rank that dies closes its connections; the hang watchdog detects one that hangs.
    gloo_group = dist.new_group(backend="gloo", timeout=NO_TIME_LIMIT)
    return World(rank, size, local_rank, local_size, torch_device, gloo_group)


def end_world() -> None:
    """Leave the process group; call it only after success.

    Under NCCL this waits for running collectives, which never finish after a failure.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _single_process_environment() -> dict[str, str]:
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": LOOPBACK}


def choose_interface() -> None:
    """Make gloo and NCCL use the interface of the rendezvous, unless the user chose others.

    On a single node this is the loopback, and no other interface is open.

    Raises:
        UserError: it is down, as in a network namespace that nobody has set up.
    """
    is_local = is_loopback(os.environ.get("MASTER_ADDR", ""))
    name = loopback_interface() if is_local else os.environ.get("DTRAIN_INTERFACE")
    if is_local and not name and GLOO_INTERFACE not in os.environ:
        message = "the loopback interface, over which the ranks of a machine meet, is down"
        raise UserError(message, fix="ip link set lo up")
    if name:
        for variable in (GLOO_INTERFACE, "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)


def loopback_interface() -> str | None:
    """Name of the loopback interface, usually `lo`; None without one."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and is_loopback(a.address) for a in addresses):
            return name
    return None
