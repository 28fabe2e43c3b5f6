"""Ranks that hang, seen by another: real processes that beat, one of which is stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.core.errors import Exit
from dtrain.distributed import watch

RANK = """
import sys, time
from pathlib import Path
from dtrain.distributed import watch
watch.BEAT_SECONDS, watch.LEAST_LIMIT_SECONDS, watch.NEIGHBOUR_EVERY_SECONDS = 0.02, 0.4, 0.1
folder, rank, life = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
one = watch.Watch(folder, rank, 2, print)
one.start()
if "step" in life:
    for number in range(5):
        one.mark(f"step {number + 1}")
        one.step()
if life == "ends":
    time.sleep(0.2)
    one.stop()
time.sleep(60)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a rank of two with a life of its own: "steps and waits", "waits" or "ends"."""
    started: list[subprocess.Popen[str]] = []

    def start(number: int, life: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, str(tmp_path), str(number), life]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def until_it_beats(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 30
    while not (folder / f"rank-{number:05d}.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("life", ["steps and waits", "waits"])
def test_a_stopped_rank_is_killed_and_named_in_a_step_and_outside_of_one(
    rank, tmp_path: Path, life: str
) -> None:
    watching, stopped = rank(0, life), rank(1, life)
    until_it_beats(tmp_path, 1)
    stopped.send_signal(signal.SIGSTOP)
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == Exit.HANG
    assert stopped.wait(10) == -signal.SIGKILL
    assert "rank 1 does not move on; last seen at: " in said and 'File "<string>"' in said


def test_a_dead_rank_is_named(rank, tmp_path: Path) -> None:
    watching, dead = rank(0, "waits"), rank(1, "waits")
    until_it_beats(tmp_path, 1)
    dead.kill()
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == Exit.HANG and "rank 1 has died; last seen at: start" in said


def test_a_rank_that_has_ended_is_not_missed(rank, tmp_path: Path) -> None:
    watching, _ = rank(0, "waits"), rank(1, "ends")
    with pytest.raises(subprocess.TimeoutExpired):
        watching.wait(3)


def test_another_process_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    beat = {"pid": os.getpid(), "born": watch.born(os.getpid()), "host": watch.HOST}
    assert watch.is_here(beat) and watch.state_of(beat) == "R"
    assert watch.state_of(beat | {"born": "1"}) == ""  # who had it before is dead
    assert not watch.is_here(json.loads(json.dumps(beat | {"host": "other"})))
