"""Process rank, device, and small CPU collectives."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dtrain.distributed.rendezvous_binding import choose_interface, listen_narrowly

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
NO_TIME_LIMIT = timedelta(days=30)
FIRST_IS_DONE = "dtrain/first_is_done"

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

    def broadcast_text(self, text: str) -> str:
        """The first rank's `text`, on every rank."""
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
        os.environ.update(_alone())
    listen_narrowly()
    choose_interface()
    # A communicator made at once, as `device_id` asks for, is a CUDA error where a rank is alone.
    is_alone = os.environ["WORLD_SIZE"] == "1"
    # gloo carries the CPU tensors of `World`; NCCL carries those of the model.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_gpu else "gloo",
        timeout=COLLECTIVE_TIMEOUT,
        device_id=torch_device if use_gpu and not is_alone else None,
    )
    size = dist.get_world_size()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    # What one rank does alone, a merge of 70B say, takes longer than a collective should; a rank
    # that dies or hangs is found by its closed connection and by the hang watchdog.
    gloo_group = dist.new_group(backend="gloo", timeout=NO_TIME_LIMIT)
    return World(dist.get_rank(), size, local_rank, local_size, torch_device, gloo_group)


def end_world() -> None:
    """Leave the process group; only for ranks that have all come to their end.

    Under NCCL this waits until nothing is under way, so it must not follow a failure.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _alone() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
