"""Start runs of the recipe `tiny`, watch them, and compare their results."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
STAGES = ("domain", "task")
STEPS = 15  # of each stage
POLL_SECONDS = 0.002
END_SECONDS = 120.0
ORPHAN_SECONDS = 60.0
LAUNCHER_SECONDS = 20.0

OVERRIDES = ["evaluation.generation={}", "launch.processes=2", "device=cpu"] + [
    f"stages.{stage}.{setting}"
    for stage in STAGES
    for setting in (
        f"train.steps={STEPS}",
        "train.checkpoint_every_steps=1",
        "method.dropout=0.05",
    )
]


@dataclass
class Start:
    """One start of `dtrain run` on a folder, in its own process group."""

    folder: Path
    overrides: list[str] = field(default_factory=list)
    recipe: str = "tiny"
    options: dict[str, object] = field(default_factory=dict)  # of Popen

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log")
        self.files_before = {stage: inode(self.metrics(stage)) for stage in STAGES}
        self.began = time.monotonic()
        command = [sys.executable, "-m", "dtrain", "run", self.recipe, *self.overrides]
        with open(self.log, "w", encoding="utf-8") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(
                [*command, f"output.folder={self.folder}"],
                cwd=ROOT,
                env=environment(),
                **(output | self.options),
            )
        self.launcher = psutil.Process(self.process.pid)

    def metrics(self, stage: str) -> Path:
        """A stage's metrics file."""
        return self.folder / stage / "metrics.jsonl"

    def steps(self, stage: str) -> list[int]:
        """Steps of a stage that this start has recorded, after it has rewritten the file."""
        path = self.metrics(stage)
        if inode(path) in (None, self.files_before[stage]):
            return []
        return list(steps_in(path))

    def workers(self) -> dict[int, psutil.Process]:
        """The running processes by rank."""
        by_rank = {}
        for child in children(self.launcher):
            try:
                by_rank[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        return by_rank

    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.process.poll() is not None

    def wait_for(self, happened: Callable[[], bool], seconds: float = END_SECONDS) -> bool:
        """Wait until something happened (True), the start ended, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return True
            if self.is_over():
                return happened()
            time.sleep(POLL_SECONDS)
        return False

    def end(self, seconds: float = END_SECONDS) -> int | None:
        """Exit status once launcher and workers have ended; None if they had to be killed."""
        left = [self.launcher, *self.workers().values()]
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        # A rank whose launcher died while it imported its libraries ends when it has done so.
        _, alive = psutil.wait_procs(left, ORPHAN_SECONDS if status is not None else 0)
        for process in alive:
            process.kill()
        if status is None:
            self.process.wait()
        return None if alive else status


class ForkedStart(Start):
    """A start without launcher and imports: ranks are forked by tests/distributed/zygote.py."""

    zygote: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log")
        self.files_before = {stage: inode(self.metrics(stage)) for stage in STAGES}
        self.began = time.monotonic()
        self.log.unlink(missing_ok=True)
        common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": free_port()}
        self.ranks = {rank: self._fork(rank, common) for rank in range(2)}

    def _fork(self, rank: int, common: dict[str, int]) -> psutil.Process:
        variables = {**common, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        arguments = [self.recipe, *self.overrides, f"output.folder={self.folder}"]
        environment = {name: str(value) for name, value in variables.items()}
        request = {"worker": "dtrain.train", "arguments": arguments, "environment": environment}
        return psutil.Process(self._ask(start=request | {"log": str(self.log)}))

    def _ask(self, **request: object) -> int:
        if ForkedStart.zygote is None:
            ForkedStart.zygote = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/distributed/zygote.py")],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        pipe = ForkedStart.zygote
        assert pipe.stdin and pipe.stdout
        pipe.stdin.write(json.dumps(request) + "\n")
        pipe.stdin.flush()
        return int(pipe.stdout.readline())

    def workers(self) -> dict[int, psutil.Process]:
        """The running processes by rank."""
        return {rank: process for rank, process in self.ranks.items() if lives(process)}

    def is_over(self) -> bool:
        """Whether all ranks have ended."""
        return not self.workers()

    def end(self, seconds: float = END_SECONDS) -> int | None:
        """The first non-zero exit status, or 0; None if the ranks had to be killed."""
        self.wait_for(lambda: len(self.workers()) < len(self.ranks), seconds)
        overdue = len(self.workers()) == len(self.ranks)
        # The other rank ends by itself, or else as a launcher ends it.
        self.wait_for(self.is_over, LAUNCHER_SECONDS)
        for process in self.workers().values():
            process.kill()
        statuses = [self._ask(wait=process.pid) for process in self.ranks.values()]
        return None if overdue else next((s for s in statuses if s), 0)


def lives(process: psutil.Process) -> bool:
    """Whether a process is running, and not a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children(process: psutil.Process) -> list[psutil.Process]:
    """Children of a process that may have ended."""
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def environment() -> dict[str, str]:
    """One thread per rank, no GPU."""
    defaults = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "COLUMNS": "200"}
    return {**os.environ, **defaults, "PYTHONPATH": str(ROOT)}


def inode(path: Path) -> int | None:
    """The file's inode; None if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def steps_in(path: Path) -> Iterator[int]:
    """Steps with a loss in a metrics file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # half a line
            continue
        if "loss" in record:
            yield record["step"]


def final_hash(folder: Path) -> str:
    """SHA-256 of a run's results: adapters, models, last checkpoints, and the loss of each step.

    Manifests are left out, as they contain times; the shards contain weights and Adam's state.
    """
    digest = hashlib.sha256()
    for stage in STAGES:
        last = sorted((folder / stage / "checkpoints").glob("step-*"))[-1]
        assert last.name == f"step-{STEPS:06d}", last
        folders = [last, folder / stage / "adapter", folder / stage / "merged"]
        for path in sorted(
            p for result_folder in folders for p in result_folder.glob("*.safetensors")
        ):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        for line in (folder / stage / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            digest.update(repr([record.get(k) for k in ("step", "loss", "grad_norm")]).encode())
    return digest.hexdigest()
