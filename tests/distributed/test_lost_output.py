"""Ranks whose output has nowhere to go: a closed terminal, a dead reader, a full disk."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.core.errors import Exit

ROOT = Path(__file__).parents[2]
SECONDS = 90
# What a rank does around its steps, without a model.
WORKER = """
import os, sys
from pathlib import Path
from dtrain.core.errors import Exit
from dtrain.core.log import say, warn
from dtrain.core.output import protect_output
from dtrain.core.run_dir import RunDir
from dtrain.pipeline.exit_report import ExitReport
from dtrain.training.preemption import StopFlag

protect_output()
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
report, stop = ExitReport(), StopFlag(folder, check_file=False)
report.open(RunDir(folder))
stop.listen()
(folder / f"up-{rank}").touch()
while not stop.is_set(0.0, 0.0) and not (folder / "finish").exists():
    say("a step \\u2192")
    print("a library's warning \\u2192", file=sys.stderr)
(folder / f"saved-{rank}").touch()
if (folder / "fail").exists():
    sys.exit(report.fail(Exit.NON_FINITE, "error: the loss \\u2192"))
sys.exit(report.end(Exit.INTERRUPTED if stop.is_set(0.0, 0.0) else Exit.FINISHED))
"""


def start(folder: Path, output: int, **options: object) -> subprocess.Popen[bytes]:
    """Start two ranks and wait until both print."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "dtrain.torchrun", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, str(worker), str(folder)], cwd=ROOT, stdout=output, stderr=output, **options
    )
    deadline = time.monotonic() + SECONDS
    while not all((folder / f"up-{rank}").exists() for rank in range(2)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def outcome(folder: Path, process: subprocess.Popen[bytes]) -> tuple[str, int, int]:
    """What the exit report says, and the exit status, once all ranks have saved."""
    try:
        status = process.wait(timeout=SECONDS)
    finally:
        (folder / "finish").touch()  # ranks that missed what they wait for end too
    assert all((folder / f"saved-{rank}").exists() for rank in range(2))
    report = json.loads((folder / "outcome.json").read_text())
    return report["outcome"], report["status"], status


@pytest.fixture
def terminal() -> Iterator[tuple[int, int, Callable[[], None]]]:
    """A terminal: its two ends, and what makes it the one of a new process."""
    outer, inner = pty.openpty()

    def lead_session() -> None:
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else ignored where the tests run under nohup
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

    yield outer, inner, lead_session
    os.close(inner)


def test_closed_terminal_saves_and_stops(terminal, tmp_path: Path) -> None:
    outer, inner, lead_session = terminal
    process = start(tmp_path, inner, stdin=inner, preexec_fn=lead_session)
    os.close(outer)  # as when ssh ends: SIGHUP, and EIO from every write
    assert outcome(tmp_path, process) == ("interrupted", Exit.INTERRUPTED, Exit.INTERRUPTED)


def test_dead_reader_ends_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = start(tmp_path, writer)
    os.close(writer)
    os.close(reader)
    (tmp_path / "finish").touch()
    assert outcome(tmp_path, process) == ("finished", Exit.FINISHED, Exit.FINISHED)


@pytest.mark.parametrize("name", ["fail", "finish"])
def test_full_disk_and_ascii_end_nothing(tmp_path: Path, name: str) -> None:
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with open("/dev/full", "w") as full:
        process = start(tmp_path, full.fileno(), env=os.environ | ascii_only)
    (tmp_path / name).touch()
    (tmp_path / "finish").touch()
    expected = {
        "fail": ("failed", Exit.NON_FINITE, Exit.NON_FINITE),
        "finish": ("finished", Exit.FINISHED, Exit.FINISHED),
    }
    assert outcome(tmp_path, process) == expected[name]
