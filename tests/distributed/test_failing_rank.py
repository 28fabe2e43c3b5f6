"""One rank fails while the others wait in a collective that never returns: all end and say why."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dtrain.launching.commands import torchrun_command

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("failing_worker.py"))


@pytest.mark.parametrize(
    ("rank", "kind", "status", "reason"),
    [
        (1, "memory", 4, "rank 1: out of memory: CUDA out of memory"),
        (0, "memory", 4, "rank 0: out of memory: CUDA out of memory"),
        (1, "crash", 1, "rank 1: Traceback"),
        (1, "exit", 1, "rank 1: Traceback"),
        (0, "interrupt", 1, "rank 0: Traceback"),
    ],
)
def test_all_ranks_end_with_the_failing_ranks_status(
    start_ranks, rank: int, kind: str, status: int, reason: str
) -> None:
    run = start_ranks(worker="failing_worker", worker_arguments=[str(rank), kind]).wait(status)
    outcome = run.json("outcome.json")
    assert (outcome["status"], outcome["rank"]) == (status, rank)
    assert outcome["reason"].startswith(reason)
    assert run.output.count(reason) == 1
    if rank:  # the first rank was ended by its own hang watchdog, not by the launcher
        assert f"rank {rank} has failed with status {status}; the others end" in run.output


def test_launcher_ends_with_the_failing_ranks_status(run_tiny) -> None:
    run = run_tiny("device=cpu", worker=[WORKER, "1", "memory"], expect=4)
    assert run.output.count("rank 1: out of memory: CUDA out of memory") == 1


PREFLIGHT = """
import os, runpy, time
import torch.distributed as dist
dist.destroy_process_group = lambda *_: time.sleep(3600)
dist.barrier = lambda group: 1 / int(os.environ["RANK"])  # fails on the first rank
runpy.run_module("dtrain.distributed.all_reduce_check", run_name="__main__", alter_sys=True)
"""


def test_failing_rank_ends_the_preflight(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(PREFLIGHT)
    command = torchrun_command(ROOT / "dtrain/recipes/tiny.yaml", 2)
    at = command.index("-m", command.index("-m") + 1)  # of the worker
    done = subprocess.run(
        [*command[:at], str(worker), *command[at + 2 :]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "gigabytes" not in done.stdout
