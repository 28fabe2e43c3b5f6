"""Another user of the node cannot run code through the ports of a run, on one node or on two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
ATTACK = Path(__file__).with_name("store_attack.py")
ROUNDS = 5  # after the ranks are up
SECONDS = 90
STATE = "torch.rendezvous"  # key of the c10d rendezvous
WORKER = """
import os, sys
from pathlib import Path
from dtrain.distributed.world import end_world, start_world
world = start_world("cpu")
Path(sys.argv[1], f"up-{world.rank}").touch()
while not world.sum([float(Path(sys.argv[1], "attacked").exists())])[0]:
    pass
end_world()
"""
ALONE = """
import sys, time
from pathlib import Path
Path(sys.argv[1], "up-0").touch()
while not Path(sys.argv[1], "attacked").exists():
    time.sleep(0.05)
"""


class Attacker:
    """The attack in another process; as another user where this one is root."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "ran"
        command = [sys.executable, "-I", "-S", "-c", ATTACK.read_text()]
        self._process = subprocess.Popen(
            [*command, str(self.file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def attack(self, victims: list[subprocess.Popen[bytes]], name: str = STATE) -> list[str]:
        """Overwrite the keys with this in their name; return the keys of all stores."""
        assert self._process.stdin is not None and self._process.stdout is not None
        ends = [end for victim in victims for end in listeners(victim.pid)]
        self._process.stdin.write(f"{json.dumps([name, ends])}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def has_run(self) -> bool:
        """Whether its code has run to the end."""
        return self.file.exists() and self.file.stat().st_size > 0

    def close(self) -> None:
        """End it."""
        self._process.communicate(timeout=30)


def listeners(launcher: int) -> list[tuple[str, int]]:
    """Where a launcher and its ranks listen; not where other programs of the machine do."""
    ends = []
    with suppress(psutil.Error):
        process = psutil.Process(launcher)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                found = member.net_connections(kind="tcp")
                ends += [s.laddr for s in found if s.status == psutil.CONN_LISTEN]
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return [(everywhere.get(end.ip, end.ip), end.port) for end in ends]


@contextmanager
def started(folder: Path, commands: list[list[str]]) -> Iterator[tuple]:
    """Launchers under attack, from their start on."""
    attacker = Attacker(folder)
    launchers = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    try:
        yield attacker, launchers
    finally:
        (folder / "attacked").touch()
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
        attacker.close()


def command(module: str, folder: Path, worker: str, *options: str) -> list[str]:
    script = folder / "worker.py"
    script.write_text(worker)
    return [sys.executable, "-m", module, *options, str(script), str(folder)]


def outer_address() -> str:
    """An address of this machine that is not the loopback, if it has one."""
    known = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    outer = [a.address for a in known if a.family == socket.AF_INET]
    return next((address for address in outer if not address.startswith("127.")), "127.0.0.1")


def test_attack_works_on_the_rendezvous_of_torchrun(tmp_path: Path) -> None:
    options = ["--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    launcher = command("torch.distributed.run", tmp_path, ALONE, *options)
    with started(tmp_path, [launcher]) as (attacker, (process,)):
        deadline = time.monotonic() + SECONDS
        while not attacker.has_run() and time.monotonic() < deadline:
            assert process.poll() is None
            attacker.attack([process])
    assert attacker.file.read_text().strip() == str(os.getuid())


@pytest.mark.parametrize("nodes", [1, 2])
def test_attack_runs_no_code(tmp_path: Path, nodes: int) -> None:
    options = [[f"--nproc-per-node={2 // nodes}", "--rdzv-id=secret"]]
    if nodes == 2:
        meet = ["--nnodes=2", f"--rdzv-endpoint={outer_address()}:{free_port()}"]
        options = [[*options[0], *meet, f"--node-rank={rank}"] for rank in range(nodes)]
    launchers = [command("dtrain.torchrun", tmp_path, WORKER, *words) for words in options]
    keys: set[str] = set()
    with started(tmp_path, launchers) as (attacker, processes):
        deadline = time.monotonic() + SECONDS
        while not all((tmp_path / f"up-{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            assert [process.poll() for process in processes] == [None] * nodes
            keys |= set(attacker.attack(processes))
        for _ in range(ROUNDS):
            keys |= set(attacker.attack(processes, name=""))
        (tmp_path / "attacked").touch()
        if nodes == 1:
            assert processes[0].wait(timeout=SECONDS) == 0
            assert not keys  # there is no store to talk to
        else:  # whoever answers for the store can stop the run, no more
            assert keys and not any(STATE in key for key in keys)
    assert not attacker.file.exists()
