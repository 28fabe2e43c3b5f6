"""Ranks of one node communicate only over the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from dtrain.core.errors import UserError
from dtrain.distributed.rendezvous import bound_store, refuse_pickles
from dtrain.distributed.world import choose_interface, loopback_interface, start_world

SECONDS = 60
# The check of the preflight, whose ranks stay until they have been looked at.
WORKER = """
import os, sys, time
from pathlib import Path
from dtrain.distributed import all_reduce_check

folder, end_world = Path(sys.argv[1]), all_reduce_check.end_world

def end_later():
    (folder / f"up-{os.environ['RANK']}").touch()
    while not (folder / "looked").exists():
        time.sleep(0.01)
    end_world()

all_reduce_check.end_world = end_later
sys.exit(all_reduce_check.main(["cpu"]))
"""


def listeners(process: psutil.Process) -> set[str]:
    """Addresses that a process and those below it listen on."""
    addresses = set()
    for child in [process, *process.children(recursive=True)]:
        try:
            sockets = child.net_connections(kind="tcp")
        except psutil.Error:
            continue
        addresses |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_store_listens_only_on_its_address(host: str) -> None:
    try:
        socket.getaddrinfo(host, 0, flags=socket.AI_ADDRCONFIG)
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    before = listeners(psutil.Process())
    store = bound_store(host, 0, is_master=True, wait_for_workers=False)
    store.set("a", "b")
    assert store.get("a") == b"b"
    assert listeners(psutil.Process()) - before <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("master", "chosen", "expected"),
    [
        ("127.0.0.1", None, loopback_interface()),
        ("::1", None, loopback_interface()),
        ("10.0.0.5", None, "ib0"),
        ("fd00::5", None, "ib0"),
        ("10.0.0.5", "eth3", "eth3"),
    ],
)
def test_gloo_and_nccl_use_the_rendezvous_interface(
    monkeypatch, master: str, chosen: str | None, expected: str
) -> None:
    environ = {"MASTER_ADDR": master, "DTRAIN_INTERFACE": "ib0"}
    environ |= {"GLOO_SOCKET_IFNAME": chosen, "NCCL_SOCKET_IFNAME": chosen} if chosen else {}
    monkeypatch.setattr(os, "environ", environ)
    choose_interface()
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == expected


def test_a_loopback_interface_that_is_down_is_named(monkeypatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"lo": []})
    with pytest.raises(UserError, match="loopback interface"):
        choose_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # the user knows better
    choose_interface()


@pytest.mark.parametrize(("ranks", "expected"), [(1, None), (2, torch.device("cuda", 0))])
def test_communicator_is_created_eagerly_only_for_several_ranks(
    monkeypatch, ranks: int, expected: torch.device | None
) -> None:
    """NCCL's of a single rank ends in a CUDA error."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **words: seen.update(words))
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", lambda **words: None)
    monkeypatch.setattr("dtrain.distributed.world.refuse_pickles", lambda: None)
    environ = {"RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(os, "environ", dict(os.environ) | environ)
    assert start_world("cuda").device == torch.device("cuda", 0)
    assert seen["device_id"] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_single_node_listens_only_on_the_loopback(tmp_path: Path) -> None:
    worker, ranks_up = tmp_path / "worker.py", [tmp_path / f"up-{rank}" for rank in range(2)]
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "dtrain.torchrun", "--nproc-per-node=2"]
    deadline, seen = time.monotonic() + SECONDS, set()
    with subprocess.Popen(
        [*command, str(worker), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as run:
        process = psutil.Process(run.pid)
        while not all(up.exists() for up in ranks_up):
            if run.poll() is not None or time.monotonic() > deadline:
                break
            seen |= listeners(process)
        seen |= listeners(process)
        (tmp_path / "looked").touch()
        said = run.communicate()[0]
    assert '"over all ranks"' in said and "wrong" not in said
    assert seen == {"127.0.0.1"}


def test_no_collective_unpickles(monkeypatch) -> None:
    monkeypatch.setattr(dist.distributed_c10d, "_tensor_to_object", None)  # put back at the end
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        refuse_pickles()
        with pytest.raises(RuntimeError, match="does not unpickle"):
            dist.all_gather_object([None], "a")
    finally:
        dist.destroy_process_group()
