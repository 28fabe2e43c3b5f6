"""Real runs whose output, disk or process is taken away: nothing is lost, every status is right.

    python tests/faults/disturb.py KIND [--count N] [--minutes M] [--seed S] [--processes P]

    hangup   the terminal closes, as when ssh ends: the run saves and stops, 75
    reader   the reader of its output ends, as `head` does: the run finishes, 0
    log      the disk of its log fills up: the run finishes, 0
    disk     the disk of the run folder fills up: the run stops, 2
    kill     kill -9 of a rank, the launcher, or all

Each happens at a random moment of `dtrain run tiny`: two stages of 15 steps, a save every 5. The
same command goes on, until it finishes: then adapters, models, Adam's state and the loss of every
step are those of an undisturbed run, to the bit. The starts have umask 000, and nobody else may
open what they write. A line for each fault; the exit status is 1 if one of this is not so. `log`
and `disk` need root.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import psutil
from kill import position, saved
from starts import STAGES, STEPS, Start, final_hash

from dtrain.core.errors import Exit

INTERVAL = 5  # steps between saves
# A save runs during the steps, which take milliseconds here, and ends before the next one starts.
MAX_LOST = 2 * INTERVAL - 1
SPREAD_SECONDS = 0.3  # until the fault, from the step that was drawn
OVERRIDES = ["evaluation.generation={}", "device=cpu"] + [
    f"stages.{stage}.{setting}"
    for stage in STAGES
    for setting in (
        f"train.steps={STEPS}",
        f"train.checkpoint_every_steps={INTERVAL}",
        "method.dropout=0.05",
    )
]
FINISHED = {int(Exit.FINISHED): "finished"}


class Fault:
    """One kind of fault, for starts that write into `folder`/runs.

    Attributes:
        ends: the exit statuses of a start that meets it, and what the exit report then says.
    """

    ends: ClassVar[dict[int, str]] = FINISHED

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw

    @contextmanager
    def output(self) -> Iterator[dict[str, object]]:
        """Yield options of Popen for a start's output."""
        yield {}

    def strike(self, start: Start) -> None:
        """Let it happen."""
        raise NotImplementedError

    def undo(self) -> None:
        """Prepare the next start."""


class Reader(Fault):
    """A pipe whose reader ends."""

    @contextmanager
    def output(self) -> Iterator[dict[str, object]]:
        outer, inner = self.open()
        self.reader = subprocess.Popen(
            ["cat"], stdin=outer, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(outer)
        yield {"stdout": inner, "stderr": inner} | self.options(inner)
        os.close(inner)

    def open(self) -> tuple[int, int]:
        """The ends of the reader and of the start."""
        return os.pipe()

    def options(self, inner: int) -> dict[str, object]:
        """More options of Popen."""
        return {}

    def strike(self, start: Start) -> None:
        self.reader.kill()

    def undo(self) -> None:
        self.reader.kill()
        self.reader.wait()


class Hangup(Reader):
    """A terminal that closes."""

    ends: ClassVar = {int(Exit.INTERRUPTED): "interrupted"}

    def open(self) -> tuple[int, int]:
        return pty.openpty()

    def options(self, inner: int) -> dict[str, object]:
        def lead_session() -> None:
            os.setsid()
            fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

        return {"stdin": inner, "preexec_fn": lead_session, "start_new_session": False}


class Disk(Fault):
    """The disk of the run folder fills up; the exit report may find no room either."""

    ends: ClassVar = {int(Exit.USER_ERROR): "failed"}
    disk, size = "runs", "96m"

    def __init__(self, folder: Path, draw: random.Random) -> None:
        super().__init__(folder, draw)
        self.ballast = folder / self.disk / "ballast"
        options = f"size={self.size},mode=700"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.ballast.parent)]
        self.ballast.parent.mkdir(exist_ok=True)
        subprocess.run(command, check=True)

    def strike(self, start: Start) -> None:
        with open(self.ballast, "ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def undo(self) -> None:
        self.ballast.unlink(missing_ok=True)


class Log(Disk):
    """The disk of the log fills up."""

    ends: ClassVar = FINISHED
    disk, size = "logs", "1m"

    @contextmanager
    def output(self) -> Iterator[dict[str, object]]:
        with open(self.ballast.with_name("log"), "wb") as log:
            yield {"stdout": log, "stderr": log}


class Kill(Fault):
    """kill -9 of a rank, the launcher, or all."""

    ends: ClassVar = {int(Exit.CRASHED): "", -9: ""}

    def strike(self, start: Start) -> None:
        workers = sorted(start.workers().values(), key=lambda worker: worker.pid)
        victims = [[start.launcher], [start.launcher, *workers], *([w] for w in workers)]
        for process in self.draw.choice(victims):
            with suppress(psutil.NoSuchProcess):
                process.kill()


KINDS = {"hangup": Hangup, "reader": Reader, "log": Log, "disk": Disk, "kill": Kill}


class Campaign:
    """Faults of one kind, in as many runs as they take."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.draw, self.runs = random.Random(arguments.seed), folder / "runs"
        self.runs.mkdir()
        self.overrides = [*OVERRIDES, f"launch.processes={arguments.processes}"]
        start = Start(folder / "undisturbed", self.overrides)
        assert start.end(600) == Exit.FINISHED, start.log.read_text()
        self.expected = final_hash(start.folder)
        self.count, self.deadline = arguments.count, time.monotonic() + 60 * arguments.minutes
        self.fault = KINDS[arguments.kind](folder, self.draw)
        self.bad, self.lost, self.statuses = list[str](), Counter[int](), Counter[int | None]()

    def wants_more(self) -> bool:
        """Whether more faults are to happen."""
        return self.lost.total() < self.count and time.monotonic() < self.deadline

    def run(self) -> int:
        """Let them happen; return the exit status."""
        number = 0
        while self.wants_more() and not self.bad:
            self.one_run(self.runs / f"run-{number}")
            number += 1
        lost, statuses = dict(sorted(self.lost.items())), dict(self.statuses)
        print(f"{self.lost.total()} faults in {number} runs, steps lost {lost}, {statuses=}")
        print("\n".join(self.bad) or "all equal")
        return 1 if self.bad else 0

    def one_run(self, folder: Path) -> None:
        """Disturb starts at later and later steps, until one finishes, and compare the results."""
        status, before = None, 0
        while status != Exit.FINISHED and not self.bad:
            step = None
            if self.wants_more() and before < 2 * STEPS - 1:
                step = self.draw.randint(before + 1, 2 * STEPS - 1)
            status = self.one_start(folder, step)
            before = max(position(folder), before + 1)
        if not self.bad and final_hash(folder) != self.expected:
            self.bad.append(f"{folder}: other weights or losses")
        for path in folder.rglob("*"):
            if stat.S_IMODE(path.lstat().st_mode) & 0o077:
                self.bad.append(f"{path}: others may open it")
        if not self.bad:
            shutil.rmtree(folder)

    def one_start(self, folder: Path, step: int | None) -> int | None:
        """Start, disturb it behind a step if one is given, and check how it ends."""
        with self.fault.output() as options:
            start = Start(folder, self.overrides, options={"umask": 0, **options})
        is_disturbed = False
        if step is not None:
            start.wait_for(lambda: bool(position(folder) >= step and has_trained(start)))
            time.sleep(self.draw.uniform(0, SPREAD_SECONDS))
            is_disturbed = not start.is_over()
        if is_disturbed:
            self.fault.strike(start)
        status = start.end()
        self.fault.undo()
        lost = 0 if status == Exit.FINISHED else position(folder) - saved(folder)
        ends: ClassVar = FINISHED | (self.fault.ends if is_disturbed else {})
        if status not in ends or lost > MAX_LOST or not agrees(folder, status, ends[status]):
            self.bad.append(f"{folder}, step {step}: status {status}, {lost} steps lost")
        if is_disturbed:
            self.lost[lost] += 1
            self.statuses[status] += 1
            print(f"step {step}: status {status}, {lost} steps lost", flush=True)
        return status


def has_trained(start: Start) -> bool:
    """Whether this start has written a step."""
    return any(start.steps(stage) for stage in STAGES)


def agrees(folder: Path, status: int, outcome: str) -> bool:
    """Whether the exit report says what the exit status does; a killed start writes none."""
    path = folder / "outcome.json"
    if status == Exit.USER_ERROR and not path.exists():
        return True
    report = json.loads(path.read_text()) if path.exists() else {}
    return not outcome or (report.get("status"), report.get("outcome")) == (status, outcome)


def main() -> int:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=60, help="then no more faults happen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup a run would ignore its terminal
    folder = Path(tempfile.mkdtemp(prefix="dtrain-disturb-"))
    try:
        status = Campaign(folder, arguments).run()
        if status == 0:
            shutil.rmtree(folder / "undisturbed")
        return status
    finally:
        for name in ("runs", "logs"):
            subprocess.run(["umount", "-l", str(folder / name)], capture_output=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
