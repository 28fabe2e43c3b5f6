"""Ranks of one node are reached over the loopback alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RECIPE = Path(__file__).parents[3] / "dtrain/recipes/tiny.yaml"
SECONDS = 60


def listeners(process: psutil.Process) -> set[str]:
    """Addresses that a process and those below it listen on."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            sockets = one.net_connections(kind="tcp")
        except psutil.Error:
            continue
        found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_single_node_listens_on_the_loopback_alone():
    command = [sys.executable, "-m", "dtrain.torchrun", "--nproc-per-node=2"]
    command += ["--local-addr=127.0.0.1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += ["-m", "dtrain.distributed.preflight", str(RECIPE)]
    started, seen = time.monotonic(), set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        process = psutil.Process(run.pid)
        while run.poll() is None and time.monotonic() - started < SECONDS:
            seen |= listeners(process)
        said = run.communicate()[0]
    assert '"over all ranks"' in said and "wrong" not in said
    assert seen == {"127.0.0.1"}
