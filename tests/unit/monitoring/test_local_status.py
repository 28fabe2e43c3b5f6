"""`dtrain status`, `logs` and `cancel` of a run that no batch system knows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.core.errors import UserError
from dtrain.core.locks import FolderLock
from dtrain.core.run_dir import RunDir
from dtrain.monitoring.local_status import follow_local, local_status, stop_local

HOLD = """
import signal, sys, time
from pathlib import Path
from dtrain.core.run_dir import RunDir
lock = RunDir(Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(60)
"""


def make_run(folder: Path, *ends: dict, output: str = "") -> RunDir:
    """A run of one stage with an attempt."""
    folder.mkdir()
    run = RunDir(folder)
    run.recipe.write_text("name: x\nstages: [{name: domain, kind: cpt}]\n")
    start = {"started": 1e9, "host": "node7", "nodes": 1, "ranks": 2, "device": "cpu"}
    start |= {"start": "a", "command": "dtrain run my.yaml", "output": output}
    run.starts.write_text("".join(json.dumps(line) + "\n" for line in (start, *ends)))
    run.stage("domain").path.mkdir()
    line = {"step": 3, "total_steps": 9, "loss": 2.5, "time": 1e9 + 60, "tokens_per_second": 10.0}
    run.stage("domain").metrics.write_text(json.dumps(line) + "\n")
    return run


@pytest.fixture
def holder(tmp_path):
    """A process that works on the run folder `run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_a_running_run_is_named_and_stopped(tmp_path, holder) -> None:
    make_run(tmp_path / "made")
    assert holder.stdout.readline() == "held\n"
    for path in (tmp_path / "made").iterdir():
        path.rename(tmp_path / "run" / path.name)
    lines = local_status(tmp_path / "run")
    assert lines[0].startswith(f"running: process {holder.pid} on ")
    assert lines[1].startswith("stage domain: step 3 of 9")
    assert f"process {holder.pid}" in stop_local(tmp_path / "run")
    assert holder.wait(timeout=30) == -signal.SIGTERM
    assert "no end recorded" in local_status(tmp_path / "run")[-1]
    assert "ended without a report" in local_status(tmp_path / "run")[0]
    assert stop_local(tmp_path / "run").startswith("no job or process")


def test_a_run_that_ends_before_it_is_signaled_is_over(tmp_path, holder, monkeypatch) -> None:
    assert holder.stdout.readline() == "held\n"
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\n")
    holder_here = FolderLock.holder_here

    def end_after(lock: FolderLock) -> int | None:
        process = holder_here(lock)
        holder.kill()
        holder.wait()
        return process

    monkeypatch.setattr(FolderLock, "holder_here", end_after)
    assert stop_local(tmp_path / "run").startswith("no job or process")
    assert not (tmp_path / "run" / "stop").exists()


def test_a_process_that_cannot_be_signaled_is_stopped_by_a_file(tmp_path, holder) -> None:
    assert holder.stdout.readline() == "held\n"
    make_run(tmp_path / "made")
    for path in (tmp_path / "made").iterdir():
        path.rename(tmp_path / "run" / path.name)
    (tmp_path / "run" / ".lock").write_text("process 1 on another-node\n")
    assert "process 1 on another-node was asked" in stop_local(tmp_path / "run")
    assert (tmp_path / "run" / "stop").exists() and holder.poll() is None


@pytest.mark.parametrize("outcome", ["finished", "interrupted", "failed"])
def test_a_run_that_ended_says_how_and_how_to_go_on(tmp_path, outcome) -> None:
    end = {"start": "a", "ended": 1e9 + 90, "outcome": outcome, "reason": "because"}
    run = make_run(tmp_path / "run", end)
    run.exit_report.write_text(json.dumps({"outcome": outcome, "reason": "because"}))
    lines = local_status(run.path)
    assert lines[0].startswith(outcome)
    assert ("dtrain run my.yaml" in lines[0]) == (outcome != "finished")
    assert outcome in lines[-1] and "node7" in lines[-1]


def test_logs_are_the_file_that_the_run_prints_to_or_a_word_where_it_went(tmp_path) -> None:
    log = tmp_path / "my.log"
    log.write_text("a line\n")
    run = make_run(tmp_path / "run", output=str(log))
    assert "".join(follow_local(run.path, until_over=True)) == "a line\n"
    log.unlink()
    for name, output, place in (
        ("run", str(log), "which is gone"),
        ("tty", "/dev/pts/9", "to the terminal /dev/pts/9"),
        ("pipe", "", "into a pipe"),
    ):
        if not (tmp_path / name).exists():
            make_run(tmp_path / name, output=output)
        with pytest.raises(UserError, match=place):
            list(follow_local(tmp_path / name, until_over=False))
    with pytest.raises(UserError, match="is not a run folder"):
        local_status(tmp_path)
    (tmp_path / "night-1").mkdir()
    RunDir(tmp_path / "night-1").recipe.write_text("name: x\n")
    with pytest.raises(UserError, match=r"does not exist\n.*did you mean .*night-1\?"):
        local_status(tmp_path / "nigth-1")
