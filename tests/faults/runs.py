"""Runs of the recipe `tiny` that are started, watched, killed and compared from outside."""

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

ROOT = Path(__file__).parents[2]
STAGES = ("domain", "task")
STEPS = 15  # of each stage
POLL_SECONDS = 0.002
END_SECONDS = 120.0

OVERRIDES = ["evaluation.questions=null", "launch.processes=2", "device=cpu"] + [
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
    """One start of `dtrain run` on a folder, in a session of its own."""

    folder: Path
    overrides: list[str] = field(default_factory=list)
    recipe: str = "tiny"

    def __post_init__(self) -> None:
        self.log = self.folder.with_suffix(".log")
        self.files_before = {stage: inode(self.metrics(stage)) for stage in STAGES}
        self.began = time.monotonic()
        command = [sys.executable, "-m", "dtrain", "run", self.recipe, *self.overrides]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, f"output.folder={self.folder}"],
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.launcher = psutil.Process(self.process.pid)

    def metrics(self, stage: str) -> Path:
        """A stage's metrics file."""
        return self.folder / stage / "metrics.jsonl"

    def steps(self, stage: str) -> list[int]:
        """Steps of a stage that this start knows of; none until it has opened the file anew."""
        path = self.metrics(stage)
        if inode(path) in (None, self.files_before[stage]):
            return []
        return list(steps_in(path))

    def workers(self) -> dict[int, psutil.Process]:
        """Rank → its process, of those that live."""
        found = {}
        for child in children(self.launcher):
            try:
                found[int(child.environ()["RANK"])] = child
            except (psutil.Error, KeyError):
                continue
        return found

    def wait_for(self, happened: Callable[[], bool], seconds: float = END_SECONDS) -> bool:
        """Look until something happened (True), the start ended, or the time is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return True
            if self.process.poll() is not None:
                return happened()
            time.sleep(POLL_SECONDS)
        return False

    def end(self, seconds: float = END_SECONDS) -> int | None:
        """Exit status once launcher and workers are gone; None if they do not go by themselves."""
        left = [self.launcher, *self.workers().values()]
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        _, alive = psutil.wait_procs(left, 10 if status is not None else 0)
        for process in alive:
            process.kill()
        if status is None:
            self.process.wait()
        return None if alive else status


def children(process: psutil.Process) -> list[psutil.Process]:
    """Children of a process that may be gone."""
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def environment() -> dict[str, str]:
    """One thread a rank, no GPU."""
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "COLUMNS": "200"}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


def inode(path: Path) -> int | None:
    """Which file it is; None if there is none."""
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
    """SHA-256 over all that a run has made: adapters, models, last checkpoints, loss of each step.

    A manifest holds times and is left out; the shards beside it hold weights and Adam's state.
    """
    digest = hashlib.sha256()
    for stage in STAGES:
        last = sorted((folder / stage / "checkpoints").glob("step-*"))[-1]
        assert last.name == f"step-{STEPS:06d}", last
        parts = [last, folder / stage / "adapter", folder / stage / "merged"]
        for path in sorted(p for part in parts for p in part.glob("*.safetensors")):
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
        for line in (folder / stage / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            digest.update(repr([record.get(k) for k in ("step", "loss", "grad_norm")]).encode())
    return digest.hexdigest()
