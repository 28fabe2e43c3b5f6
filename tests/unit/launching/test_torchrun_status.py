"""Exit statuses and signals between `dtrain run` and its workers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dtrain.core.errors import Exit
from dtrain.launching.commands import launcher_environment, torchrun_command, worker_environment
from dtrain.torchrun import status_of

WORKER = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "user error" and rank == 1:
    print("error: the worker's own words", file=sys.stderr)
    sys.exit(2)
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
os.write(1, b"ready\\n")  # in one piece: two ranks share the pipe
while not asked:
    time.sleep(0.01)
sys.exit(75)
"""


def start(tmp_path: Path, what: str) -> subprocess.Popen[str]:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = torchrun_command(Path("unused"), 2)
    command = [*command[: command.index("dtrain.train") - 1], str(worker), what]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **streams)


def failures(*codes: int) -> dict[int, ProcessFailure]:
    return {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        for rank, code in enumerate(codes)
        if code
    }


@pytest.mark.parametrize(
    ("codes", "seen", "status"),
    [
        ((0, 2), (), Exit.USER_ERROR),
        ((1, 2), (), Exit.USER_ERROR),  # the others lost their connection
        ((-15, 3), (), Exit.NON_FINITE),
        ((75, -15), (), Exit.GO_ON),
        ((0, 75), (), Exit.GO_ON),
        ((1, 75), (), Exit.CRASHED),  # the second was ended because the first had crashed
        ((75, -9), (), Exit.CRASHED),
        ((75, -9), (9, 2), Exit.GO_ON),  # Ctrl-C twice
        ((-15, -15), (15,), Exit.GO_ON),  # asked to stop before it listened
        ((-15, -9), (), Exit.CRASHED),
        ((1, -15), (), Exit.CRASHED),
        ((17, 0), (), Exit.CRASHED),
    ],
)
def test_one_status_out_of_many(codes: tuple[int, ...], seen: tuple[int, ...], status: int) -> None:
    assert status_of(failures(*codes), set(seen)) == status


def test_a_workers_own_status_and_words_are_all_there_is(tmp_path: Path) -> None:
    process = start(tmp_path, "user error")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.USER_ERROR
    assert errors.strip() == "error: the worker's own words"


def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    start(tmp_path, "user error").communicate(timeout=120)
    assert list(temporary.iterdir()) == []


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    process = start(tmp_path, "killed")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.CRASHED
    assert "rank 1 was killed by SIGKILL" in errors and "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_workers(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "wait")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.GO_ON
    assert errors == ""


def test_hostile_names_stay_one_argument() -> None:
    name = 'a\'; echo "$HOME" `id` && \n'
    assert torchrun_command(Path(name), 2, ["--x y"])[-3:] == [name, "--allow-change", "--x y"]


def test_the_workers_environment() -> None:
    found = worker_environment({}, 10**6, has_gpu=False)
    assert found["OMP_NUM_THREADS"] == "1" and found["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in worker_environment({}, 1, has_gpu=True)
    assert "OMP_NUM_THREADS" not in worker_environment({"OMP_NUM_THREADS": "7"}, 1, has_gpu=True)
    assert (
        launcher_environment({"A": "b"}, "cpu").items()
        >= {"A": "b", "DS_ACCELERATOR": "cpu"}.items()
    )


def test_python_is_the_one_that_runs_us() -> None:
    assert torchrun_command(Path("x"), "auto")[0] == sys.executable
