"""Real runs of the recipe `tiny`: real worker processes under gloo, real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = ["-m", "dtrain.train"]
TIMEOUT_SECONDS = 240


@dataclass
class Run:
    """What a finished `tiny` run left behind."""

    folder: Path
    status: int
    output: str

    def losses(self) -> list[str]:
        """One line a step: 'stage step loss grad_norm'."""
        lines = []
        for stage in ("domain", "task"):
            for record in self.records(stage):
                if "loss" in record:
                    values = f"{record['loss']:.6f} {record['grad_norm']:.6f}"
                    lines.append(f"{stage} {record['step']} {values}")
        return lines

    def records(self, stage: str) -> list[dict]:
        """Lines of a stage's metrics.jsonl."""
        text = (self.folder / stage / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def json(self, name: str) -> dict:
        """A JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())


def torchrun(ranks: int) -> list[str]:
    """The launcher that `dtrain run` uses."""
    options = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "dtrain.torchrun", *options]


def environment(**more: str) -> dict[str, str]:
    """One thread a rank; no GPU; nothing of an outer launcher."""
    own = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **own, "PYTHONPATH": path, **more}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples and packed data, made once for all tests."""
    given = os.environ.get("DTRAIN_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("cache")


def execute(command: Sequence[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the project to its end."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(DTRAIN_CACHE=str(cache)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


@pytest.fixture
def start(cache: Path) -> Callable[[int, Sequence[str]], str]:
    """Start a worker of the test's own on some ranks; gives what it printed."""

    def run(ranks: int, worker: Sequence[str]) -> str:
        done = execute([*torchrun(ranks), *worker], cache)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done.stdout

    return run


@pytest.fixture
def run_tiny(tmp_path: Path, cache: Path) -> Callable[..., Run]:
    """Run `tiny` with overrides under a launcher; the folder is the test's own."""

    def run(
        *overrides: str,
        ranks: int = 2,
        launcher: Sequence[str] | None = None,
        folder: str = "run",
        options: Sequence[str] = (),
        worker: Sequence[str] = WORKER,
        expect: int | None = 0,
    ) -> Run:
        place = tmp_path / folder
        quiet = ["evaluation.questions=null"]
        command = [*(launcher or torchrun(ranks)), *worker, "tiny", *quiet, *overrides]
        command += [f"output.folder={place}", *options]
        done = execute(command, cache)
        output = done.stdout + done.stderr
        assert expect is None or done.returncode == expect, output[-6000:]
        return Run(place, done.returncode, output)

    return run
