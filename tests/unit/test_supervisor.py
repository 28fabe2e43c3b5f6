"""The supervisor of an attempt, as slurm/job.sh starts it, among commands that pose as Slurm's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.core.errors import Exit
from dtrain.core.run_dir import RunDir
from dtrain.launching.attempts import read_attempts

ROOT = Path(__file__).parents[2]
SECONDS = 60
COMMANDS = {
    "scontrol": """\
case "$1 $2" in
    "show hostnames") echo n0 ;;
    "show job") printf 'JobId=7\\n   JobState=RUNNING Reason=None\\n' ;;
    "requeue 7") touch "$FAKE/requeued" ;;
esac
""",
    # Ranks that stop when they are asked to, or when the file `finish` says how.
    "srun": """\
trap 'touch "$FAKE/asked"; exit 75' USR1
printf '%s\\n' "$@" >"$FAKE/command"
touch "$FAKE/training"
until [[ -s "$FAKE/finish" ]]; do sleep 0.05; done
exit "$(cat "$FAKE/finish")"
""",
}


class Job:
    """A job script under bash; `fake` has the commands and what they left."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.fake, self.run = folder / "fake", RunDir(folder / "run")
        self.fake.mkdir()
        for name, text in COMMANDS.items():
            (self.fake / name).write_text(f"#!/bin/bash\n{text}")
            (self.fake / name).chmod(0o755)
        script = folder / "job.sh"
        script.write_text(f"DTRAIN_RECIPE=tiny\nsource {ROOT}/slurm/job.sh\n")
        keys = ["device=cpu", "launch.processes=1", f"output.folder={self.run.path}"]
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "DTRAIN_ENV": sys.prefix}
        slurm |= {"DTRAIN_PREFLIGHT": "off", "FAKE": str(self.fake)}
        slurm |= {"PATH": f"{self.fake}:{os.environ['PATH']}", **environ}
        self.process = subprocess.Popen(
            ["bash", str(script), *keys],
            env=os.environ | slurm,
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, name: str) -> None:
        """Wait until one of the commands has left a file."""
        self._wait_until((self.fake / name).exists)

    def terminate(self) -> None:
        """Send SIGTERM, and wait until it was delivered."""
        self.process.terminate()
        self._wait_until(lambda: not self._has_pending(signal.SIGTERM))

    def _has_pending(self, number: int) -> bool:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        pending = status.partition("ShdPnd:")[2].split()[0]
        return bool(int(pending, 16) >> (number - 1) & 1)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        """Stderr of a job that has ended."""
        return self.process.communicate(timeout=SECONDS)[1]

    def outcomes(self) -> list[tuple[str, str]]:
        """Outcome and action of each attempt."""
        return [(attempt.outcome, attempt.action) for attempt in read_attempts(self.run)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a job; it is killed after the test."""
    jobs: list[Job] = []

    def start_job(**environ: str) -> Job:
        jobs.append(Job(tmp_path, **environ))
        return jobs[0]

    yield start_job
    for job in jobs:
        job.process.kill()


def test_warning_reaches_the_ranks_and_the_job_is_requeued(start) -> None:
    job = start()
    job.wait_for("training")
    job.process.send_signal(signal.SIGUSR1)
    job.wait_for("requeued")
    assert (job.fake / "asked").exists() and job.run.stop.exists()
    job.process.terminate()  # as Slurm does when it requeues
    log = job.log()
    assert job.process.returncode == -signal.SIGTERM
    assert "Slurm warned" in log and "warned; requeued" in log
    assert job.outcomes() == [("warned", "requeue")]


def test_warning_before_the_supervisor_listens_is_kept(start, tmp_path: Path) -> None:
    python = tmp_path / "env/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\nkill -USR1 $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = start(DTRAIN_ENV=str(tmp_path / "env"))
    job.wait_for("requeued")
    job.process.terminate()
    assert job.log().count("Slurm warned") == 1
    assert job.outcomes() == [("warned", "requeue")] and not (job.fake / "training").exists()


def test_sigterm_does_not_end_the_wait_for_the_ranks(start) -> None:
    job = start()
    job.wait_for("training")
    for _ in range(3):
        job.terminate()
    (job.fake / "finish").write_text("0")
    log = job.log()
    assert job.process.returncode == 0, log
    assert job.outcomes() == [("finished", "over")] and not (job.fake / "requeued").exists()


@pytest.mark.parametrize("status", [Exit.USER_ERROR, Exit.NON_FINITE, Exit.OUT_OF_MEMORY])
def test_exit_status_of_the_ranks_is_kept(start, status: Exit) -> None:
    job = start()
    job.wait_for("training")
    (job.fake / "finish").write_text(str(int(status)))
    log = job.log()
    assert job.process.returncode == status, log
    assert job.outcomes() == [("failed", "stop")]


def test_recipe_error_ends_the_job_before_an_attempt(start) -> None:
    job = start(SLURM_JOB_NODELIST="")
    assert "error: SLURM_JOB_NODELIST: this is not a job of Slurm" in job.log()
    assert job.process.returncode == Exit.USER_ERROR
    assert job.outcomes() == []


def test_supervisor_imports_no_torch() -> None:
    code = "import sys, dtrain.supervisor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
