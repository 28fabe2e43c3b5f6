"""The watchdog detects hung ranks in real processes that are stopped or killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.core.errors import Exit
from dtrain.distributed import hang_watchdog
from dtrain.pipeline import exit_report

RANK = """
import os, signal, sys, time
from pathlib import Path
from dtrain.distributed import hang_watchdog as watch
watch.BEAT_SECONDS, watch.MIN_LIMIT_SECONDS, watch.NEIGHBOR_CHECK_SECONDS = 0.02, 0.4, 0.1
folder, rank, life = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watchdog = watch.HangWatchdog(folder, rank, 2, print)
watchdog.start()
while not (folder / f"rank-{1 - rank:05d}.json").exists():
    time.sleep(0.01)
if "step" in life:
    for number in range(5):
        watchdog.record_position(f"step {number + 1}")
        watchdog.step()
if "stops" in life:
    os.kill(os.getpid(), signal.SIGSTOP)
if life == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if life == "ends":
    time.sleep(0.2)
    watchdog.stop()
if life == "fails":  # once the other rank has seen it
    while not (folder / "seen").exists():
        time.sleep(0.01)
    watchdog.stop(finished=False)
while 1 - rank not in watchdog._known:
    time.sleep(0.01)
(folder / "seen").touch()
time.sleep(60)
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start one of two ranks as a subprocess; see RANK."""
    started: list[subprocess.Popen[str]] = []

    def start(number: int, life: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, str(tmp_path), str(number), life]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("before", ["steps and ", ""])
def test_stopped_rank_is_killed_and_named_inside_and_outside_a_step(rank, before: str) -> None:
    watching, stopped = rank(0, f"{before}waits"), rank(1, f"{before}stops")
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == Exit.HANG
    assert stopped.wait(10) == -signal.SIGKILL
    assert "rank 1 does not advance; last seen at: " in said and 'File "<string>"' in said


def test_a_dead_rank_is_named(rank) -> None:
    watching, _ = rank(0, "waits"), rank(1, "dies")
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == Exit.HANG and "rank 1 has died; last seen at: start" in said


def test_finished_rank_is_not_reported(rank) -> None:
    watching, _ = rank(0, "waits"), rank(1, "ends")
    with pytest.raises(subprocess.TimeoutExpired):
        watching.wait(3)


def test_rank_without_a_heartbeat_is_named(rank) -> None:
    watching, _ = rank(0, "waits"), rank(1, "fails")
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == Exit.HANG and "rank 1 has died; last seen at: start" in said


class Clock:
    """time.monotonic, forwarded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead, real = 0.0, time.monotonic
        monkeypatch.setattr(hang_watchdog.time, "monotonic", lambda: real() + self._ahead)

    def forward(self, seconds: float) -> None:
        self._ahead += seconds


def in_steps(folder: Path, min_limit_seconds: float | None = None) -> hang_watchdog.HangWatchdog:
    """The first of two ranks, which has made five steps; the test does what its thread would."""
    watchdog = hang_watchdog.HangWatchdog(folder, 0, 2, print, min_limit_seconds=min_limit_seconds)
    for number in range(5):
        watchdog.record_position(f"step {number + 1}")
        watchdog.step()
    watchdog._beat()
    return watchdog


def other_beats(folder: Path, **differs: Any) -> None:
    """A heartbeat of the second rank, on another machine if not said otherwise."""
    beat = {"rank": 1, "pid": 1, "start_time": "", "host": "elsewhere", "beat": 1, "positions": 5}
    beat |= {"position": "step 5", "patient": False, "finished": False, "stack": ""}
    (folder / "rank-00001.json").write_text(json.dumps(beat | differs))


def ranks_named(watchdog: hang_watchdog.HangWatchdog) -> list[int]:
    return [beat["rank"] for beat in watchdog._culprits()]


def test_remote_rank_is_not_reported_as_stopped_for_a_minute(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = in_steps(tmp_path, 60.0)
    other_beats(tmp_path)
    for _ in range(12):  # its node's file system shows the same heartbeat for a minute
        clock.forward(5)
        assert ranks_named(watchdog) == []
    for _ in range(12):
        clock.forward(5)
        named = ranks_named(watchdog)
    assert named == [1]


def test_rank_that_fails_may_wait_for_the_first_ranks_report(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = in_steps(tmp_path, 60.0)
    other_beats(tmp_path)
    clock.forward(6)
    assert ranks_named(watchdog) == []
    (tmp_path / "rank-00001.json").unlink()
    for seconds, named in ((6, []), (exit_report.WAIT_SECONDS + 15, []), (6, [1])):
        clock.forward(seconds)
        assert ranks_named(watchdog) == named


@pytest.mark.parametrize("least", [hang_watchdog.MIN_LIMIT_SECONDS, 60.0])
def test_step_may_take_twice_the_minimum_limit(tmp_path, monkeypatch, least: float) -> None:
    clock = Clock(monkeypatch)
    watchdog = in_steps(tmp_path, least)
    other_beats(tmp_path, beat=0.5, positions=3)
    clock.forward(2 * least - 1)
    assert ranks_named(watchdog) == []
    other_beats(tmp_path, beat=1.5, positions=3)
    clock.forward(2)
    assert ranks_named(watchdog) == [1]


def test_compiling_rank_is_not_killed(tmp_path, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    watchdog = in_steps(tmp_path)
    other_beats(tmp_path, positions=3, patient=True)
    clock.forward(60)
    assert ranks_named(watchdog) == []
    watchdog.compiling(True)
    other_beats(tmp_path, beat=2, positions=9)
    clock.forward(60)
    assert ranks_named(watchdog) == []
    watchdog.compiling(False)
    assert ranks_named(watchdog) == []  # the limit starts again
    other_beats(tmp_path, beat=3, positions=9)
    clock.forward(60)
    assert ranks_named(watchdog) == [0]


def test_torch_reports_compilation(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Noting(hang_watchdog.HangWatchdog):
        def compiling(self, now: bool) -> None:
            seen.append(now)

    hang_watchdog.follow_compilations(Noting(tmp_path, 0, 1, print))
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert seen == [True, False]


def test_waiting_rank_exits_with_the_status_of_a_failed_rank(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from dtrain.distributed import hang_watchdog as watch
watch.BEAT_SECONDS = 0.02
watch.HangWatchdog(Path(sys.argv[1]), 0, 2, print, failure=lambda: (1, 4)).start()
time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 4
    assert "rank 1 has failed with status 4" in done.stdout


def test_process_with_a_reused_pid_is_not_killed(tmp_path: Path) -> None:
    beat = {
        "pid": os.getpid(),
        "start_time": hang_watchdog.process_start_time(os.getpid()),
        "host": hang_watchdog.HOST,
    }
    assert hang_watchdog.is_on_this_host(beat) and hang_watchdog.process_state(beat) == "R"
    assert hang_watchdog.process_state(beat | {"start_time": "1"}) == ""  # reused
    assert not hang_watchdog.is_on_this_host(json.loads(json.dumps(beat | {"host": "other"})))
