"""Runs whose output has nowhere to go: a closed terminal, a dead reader, a full disk."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.core.errors import Exit

ROOT = Path(__file__).parents[2]
SECONDS = 120
SHORT = ["evaluation.sets={}", "evaluation.questions=null", "device=cpu"] + [
    f"stages.{stage}.train.{setting}"
    for stage in ("domain", "task")
    for setting in ("evaluate_every_steps=null", "evaluate_on=null")
]
ENDLESS = ["stages.domain.train.steps=100000", "stages.domain.train.checkpoint_every_steps=50000"]


def start(run: Path, *overrides: str, **streams: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dtrain", "run", "tiny", *SHORT, *overrides]
    return subprocess.Popen([*command, f"output.folder={run}"], cwd=ROOT, **streams)


def steps(run: Path) -> list[int]:
    path = run / "domain/metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


def await_steps(run: Path, process: subprocess.Popen[bytes], count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while len(steps(run)) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def outcome(run: Path) -> tuple[str, int]:
    report = json.loads((run / "outcome.json").read_text())
    return report["outcome"], report["status"]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """A terminal: its two ends, and what makes it the one of a new process."""
    outer, inner = pty.openpty()

    def lead_session() -> None:
        os.setsid()
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

    yield outer, inner, lead_session
    os.close(inner)


@pytest.mark.parametrize("ranks", [1, 2])
def test_closed_terminal_saves_and_stops(terminal, tmp_path: Path, ranks: int) -> None:
    outer, inner, lead_session = terminal
    process = start(
        tmp_path,
        f"launch.processes={ranks}",
        *ENDLESS,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        preexec_fn=lead_session,
    )
    os.set_blocking(outer, False)
    await_steps(tmp_path, process, 5)
    os.close(outer)  # as when ssh ends: SIGHUP, and EIO from every write
    assert process.wait(timeout=SECONDS) == Exit.INTERRUPTED
    assert outcome(tmp_path) == ("interrupted", Exit.INTERRUPTED)
    saved = sorted(path.parent.name for path in tmp_path.glob("domain/checkpoints/*/manifest.json"))
    assert saved == [f"step-{steps(tmp_path)[-1]:06d}"]


def test_dead_reader_ends_no_run(tmp_path: Path) -> None:
    reader = subprocess.Popen(["head", "-n", "3"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process = start(tmp_path, "launch.processes=2", stdout=reader.stdin, stderr=reader.stdin)
    reader.stdin.close()
    assert process.wait(timeout=SECONDS) == Exit.FINISHED
    assert reader.wait() == 0 and outcome(tmp_path) == ("finished", Exit.FINISHED)


@pytest.mark.parametrize("name", ["/dev/full", "closed"])
def test_full_disk_and_other_encodings_end_no_run(tmp_path: Path, name: str) -> None:
    """A run with a warning that ASCII lacks; the streams are closed in the second case."""
    environ = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dtrain", "run", "tiny", *SHORT, "launch.processes=1"]
    command += [f"output.folder={run}", "stages.domain.train.learning_rate=1e38"]
    redirect = ">/dev/full 2>&1" if name == "/dev/full" else ">&- 2>&- <&-"
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    done = subprocess.run(shell, cwd=ROOT, env=environ, timeout=SECONDS, check=False)
    assert done.returncode == Exit.NON_FINITE
    assert outcome(run) == ("failed", Exit.NON_FINITE)
