"""Stop requests: signals, the stop file, and the end of the job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.core.interrupts import STOP_SIGNALS
from dtrain.training.preemption import SPARE_SECONDS, StopFlag, end_time


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unset the job's end time and restore the signal handlers afterwards."""
    for name in ("DTRAIN_END_TIME", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so does the flag then
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_repeated_signals_request_one_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)  # the second Ctrl-C comes within a second
    flag = StopFlag(tmp_path, check_file=True)
    flag.listen()
    assert not flag.is_set(1.0, 1.0)
    for _ in range(3):
        os.kill(os.getpid(), number)
    assert flag.is_set(1.0, 1.0)


def test_stop_file_is_seen_only_by_the_rank_that_checks_it(tmp_path: Path) -> None:
    checking, unchecked = (StopFlag(tmp_path, check_file=checks) for checks in (True, False))
    (tmp_path / "stop").touch()
    assert checking.is_set(0, 0) and not unchecked.is_set(0, 0)
    checking.forget_file()
    assert not checking.is_set(0, 0)


@pytest.mark.parametrize(("left", "stops"), [(-1, True), (1, False)])
def test_stops_while_a_step_and_a_save_still_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, stops: bool
) -> None:
    step, save, now = 100.0, 50.0, 1_000_000.0
    needed = 2 * step + 2 * save + SPARE_SECONDS
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + needed + left)))
    assert StopFlag(tmp_path, check_file=False).is_set(step, save) == stops


def test_dtrain_variable_overrides_slurm() -> None:
    assert end_time({"DTRAIN_END_TIME": "5", "SLURM_JOB_END_TIME": "9"}) == 5.0
    assert end_time({"DTRAIN_END_TIME": "soon"}) is None
