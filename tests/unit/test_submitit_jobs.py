"""A recipe that submitit trains on this machine, among ranks that only wait for a signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain import submitit_jobs
from dtrain.core.errors import Exit, UserError
from dtrain.submitit_jobs import Training

# Sends this process submitit's signal, and ends with the given status once it is asked to stop.
RANKS = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os._exit(int(sys.argv[1])))
os.kill(os.getppid(), signal.SIGUSR2)
signal.pause()
"""
SECONDS = 30


class Requeued(Exception):
    """Submitit's handler ends the process."""


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    """A training whose process is given to submitit's handler, here `Requeued`."""

    def requeue(*_: object) -> None:
        raise Requeued

    def give_up(*_: object) -> None:
        raise TimeoutError("the job does not end")

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGUSR2, requeue), (signal.SIGALRM, give_up))
    ]
    signal.alarm(SECONDS)
    yield Training("tiny", ["device=cpu", f"output.folder={tmp_path / 'run'}"])
    signal.alarm(0)
    for number, handler in before:
        signal.signal(number, handler)


def ranks_end_with(status: int, monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Let ranks end with a status once they are asked to stop; those that were started."""
    command = [sys.executable, "-c", RANKS, str(int(status))]
    monkeypatch.setattr(submitit_jobs, "torchrun_command", lambda *_: command)
    started, start = [], subprocess.Popen

    def note(*args: Any) -> subprocess.Popen[bytes]:
        started.append(start(*args))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    return started


def test_signal_lets_the_ranks_save_then_requeues(train, tmp_path, monkeypatch) -> None:
    started = ranks_end_with(Exit.INTERRUPTED, monkeypatch)
    with pytest.raises(Requeued):
        train()
    assert [ranks.returncode for ranks in started] == [Exit.INTERRUPTED]  # they had ended before
    assert (tmp_path / "run" / "stop").exists()  # for ranks that did not listen yet


@pytest.mark.parametrize("status", [Exit.FINISHED, Exit.USER_ERROR])
def test_job_that_is_over_is_not_requeued(train, status, tmp_path, monkeypatch) -> None:
    ranks_end_with(status, monkeypatch)
    if status == Exit.FINISHED:
        assert train() == str(tmp_path / "run")
    else:
        with pytest.raises(UserError, match="ended with status 2"):
            train()
