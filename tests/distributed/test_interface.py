"""Two nodes that are connected only by a second interface with IPv6, which the user names.

Each node is a network namespace; the machine's own name has no address there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = """
import os
from dtrain.distributed.world import end_world, start_world
world = start_world("cpu")
names = ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
print("sum", world.sum([1.0]), *(os.environ[name] for name in names), flush=True)
end_world()
"""


@pytest.fixture
def nodes() -> Iterator[list[list[str]]]:
    """For each of two nodes, the start of a command that runs on it."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        pytest.skip("network namespaces need root and iproute2")
    sleepers = [subprocess.Popen(["unshare", "--net", "sleep", "300"]) for _ in range(2)]
    try:
        first, second = (inside(sleeper) for sleeper in sleepers)
        names = [str(sleeper.pid) for sleeper in sleepers]
        link = ["ip", "link", "add", "ib0", "netns", names[0], "type", "veth"]
        subprocess.run([*link, "peer", "name", "ib0", "netns", names[1]], check=True)
        for number, node in enumerate([first, second]):
            subprocess.run([*node, "ip", "link", "set", "lo", "up"], check=True)
            subprocess.run([*node, "ip", "link", "set", "ib0", "up"], check=True)
            address = ["ip", "addr", "add", f"fd77::{number + 1}/64", "dev", "ib0", "nodad"]
            if subprocess.run([*node, *address], capture_output=True).returncode:
                pytest.skip("this kernel has no IPv6")
        yield [first, second]
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def inside(sleeper: subprocess.Popen[bytes]) -> list[str]:
    """The start of a command in a process's network namespace, once it has its own."""
    own_namespace, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 10
    while time.monotonic() < deadline:
        if sleeper.poll() is not None:
            pytest.skip("no network namespace can be made here")
        with suppress(FileNotFoundError):  # it has just ended
            if os.readlink(f"/proc/{sleeper.pid}/ns/net") != own_namespace:
                return ["nsenter", "-t", str(sleeper.pid), "-n"]
        time.sleep(0.01)
    raise AssertionError("no network namespace after 10 s")


def test_ranks_connect_over_the_second_interface(nodes: list[list[str]], tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "dtrain.torchrun", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-endpoint=[fd77::1]:29555"]
    environ = {**os.environ, "DTRAIN_INTERFACE": "ib0", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*node, *command, f"--node-rank={rank}", str(worker)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, node in enumerate(nodes)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0]
    for text in said:
        words = text.split()
        assert words == ["sum", "[2.0]", "fd77::1", "ib0", "ib0"]
