"""The first failure of a start is reported, by one rank, and nothing outside the run folder."""

from __future__ import annotations

import os
import time

import pytest

from dtrain.core.errors import Exit, UserError
from dtrain.core.run_dir import RunDir
from dtrain.pipeline.exit_report import ExitReport
from dtrain.training.callbacks import RunFolderWatch


def report_of(monkeypatch, run: RunDir, rank: int, start: str) -> ExitReport:
    """The exit report of a rank of a start."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", start)
    report = ExitReport()
    report.open(run)
    return report


@pytest.mark.parametrize("clock", [-3600.0, 0.0, 3600.0])
def test_first_failure_counts_whatever_the_clocks_say(monkeypatch, tmp_path, clock: float) -> None:
    """The file server's clock differs from this node's."""
    run, now = RunDir(tmp_path), time.time()
    second = report_of(monkeypatch, run, 1, "a")
    first = report_of(monkeypatch, run, 0, "a")
    assert second.failure_elsewhere() is None
    first.fail(Exit.NON_FINITE, "error: the loss")
    monkeypatch.setenv("RANK", "1")
    os.utime(run.exit_report, (now + clock, now + clock))
    assert second.failure_elsewhere() == (0, Exit.NON_FINITE)
    assert second.fail(Exit.CRASHED, "lost the connection") == Exit.NON_FINITE
    assert run.read_exit_report()["reason"] == "the loss"


def test_failure_of_another_start_is_ignored(monkeypatch, tmp_path) -> None:
    run = RunDir(tmp_path)
    report_of(monkeypatch, run, 0, "a").fail(Exit.NON_FINITE, "error: the loss")
    later = report_of(monkeypatch, run, 1, "b")  # before the first rank has removed the old one
    assert later.failure_elsewhere() is None
    assert later.fail(Exit.CRASHED, "a bug") == Exit.CRASHED


def test_same_error_of_all_ranks_is_reported_once_if_the_first_rank_is_late(
    monkeypatch, tmp_path, capsys
) -> None:
    """The first rank closes its trackers and syncs its report first."""
    run, seconds = RunDir(tmp_path), 0.0
    first = report_of(monkeypatch, run, 0, "a")
    second = report_of(monkeypatch, run, 1, "a")

    def sleep(duration: float) -> None:
        nonlocal seconds
        seconds += duration
        if seconds > 8 and not run.exit_report.exists():
            monkeypatch.setenv("RANK", "0")
            first.fail(Exit.USER_ERROR, "error: of the first rank")
            monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    assert second.fail(Exit.USER_ERROR, "error: of the second rank") == Exit.USER_ERROR
    assert "second" not in capsys.readouterr().err
    assert run.read_exit_report()["reason"] == "of the first rank"


@pytest.mark.parametrize("how", ["moved", "deleted", "made again"])
def test_run_whose_folder_is_not_in_its_place_ends_as_failed(
    monkeypatch, tmp_path, capsys, how: str
) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    report = report_of(monkeypatch, run, 0, "a")
    report.watch_folder()
    watch = RunFolderWatch(run.path)
    watch.post_step(None)
    assert report.moved_folder() is None
    run.path.rename(tmp_path / "elsewhere")
    if how != "moved":
        (tmp_path / "elsewhere").rmdir()
    if how == "made again":
        run.path.mkdir()
    with pytest.raises(UserError, match=f"{run.path}: .*moved"):
        watch.post_step(None)
    moved = report.moved_folder()
    assert moved is not None
    assert report.fail(moved.status, f"error: {moved}") == Exit.USER_ERROR
    assert "moved" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))  # nothing is created where the folder was
