"""Real runs of the recipe `tiny`: real worker processes under gloo, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
WORKER = ["-m", "dtrain.train"]
TIMEOUT_SECONDS = 240
GOLDEN = Path(__file__).parents[1] / "golden"
LOSS_TOLERANCE = 2e-5
FIGURE_TOLERANCE = {"rel": 2e-6, "abs": 2e-6}  # of runs on one machine
GOLDEN_FIGURE_TOLERANCE = {"rel": 2e-4, "abs": 2e-5}
WITHOUT_EVALUATION = ["evaluation={sets: {}}"] + [
    f"stages.{stage}.train.{key}=null"
    for stage in ("domain", "task")
    for key in ("evaluate_on", "evaluate_every_steps")
]
NORM_TOLERANCE = 2e-3  # relative: near convergence a norm is a sum of small cancelling numbers


@dataclass
class Run:
    """A finished `tiny` run."""

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

    def assert_golden(self, method: str) -> None:
        """Loss and gradient norm of every step are those of a golden file, which is written first
        if the user asks for it."""
        path, lines = GOLDEN / f"tiny-{method}.txt", self.losses()
        engine = yaml.safe_load((self.folder / "recipe.yaml").read_text())["engine"]["kind"]
        if "DTRAIN_WRITE_GOLDEN" in os.environ and engine == "ddp":
            path.write_text("\n".join(lines) + "\n")
        golden = path.read_text().splitlines()
        assert [line.rsplit(" ", 2)[0] for line in lines] == [g.rsplit(" ", 2)[0] for g in golden]
        for line, expected in zip(lines, golden, strict=True):
            loss, norm = map(float, line.split()[2:])
            golden_loss, golden_norm = map(float, expected.split()[2:])
            assert loss == pytest.approx(golden_loss, abs=LOSS_TOLERANCE), (line, expected)
            assert norm == pytest.approx(golden_norm, rel=NORM_TOLERANCE), (line, expected)

    def figures(self) -> list[list[float]]:
        """Loss, gradient norm and metrics of each step of the stage `task`, then those of the
        held-out set `rows` before and after it."""
        steps = [
            [record["loss"], record["grad_norm"], *record["metrics"].values()]
            for record in self.records("task")
            if "loss" in record
        ]
        known = self.json("evaluation.json")
        losses, metrics = known["losses"]["rows"], known["metrics"]["rows"]
        return [*steps, *([losses[m], *metrics[m].values()] for m in ("base", "task"))]

    def assert_figures(self, expected: list[list[float]], **tolerance: float) -> None:
        """`figures` are those of another run."""
        tolerance = tolerance or FIGURE_TOLERANCE
        assert self.figures() == [pytest.approx(step, **tolerance) for step in expected]

    def assert_golden_figures(self, name: str) -> None:
        """`figures` are those of a golden file, which is written first if the user asks for it."""
        path = GOLDEN / f"tiny-{name}.txt"
        if "DTRAIN_WRITE_GOLDEN" in os.environ:
            lines = [" ".join(f"{number:.6f}" for number in step) for step in self.figures()]
            path.write_text("\n".join(lines) + "\n")
        golden = [[float(n) for n in line.split()] for line in path.read_text().splitlines()]
        self.assert_figures(golden, **GOLDEN_FIGURE_TOLERANCE)

    def assert_time_in_collectives(self) -> None:
        """Every step has time in collectives, which is a part of its time."""
        for record in self.records("domain") + self.records("task"):
            if "loss" in record:
                assert 0 < record["communication_seconds"] < sum(record["seconds"].values())

    def records(self, stage: str) -> list[dict]:
        """Lines of a stage's metrics.jsonl."""
        text = (self.folder / stage / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def is_at(self, stage: str, step: int) -> bool:
        """Whether the metrics of a step are written."""
        with suppress(FileNotFoundError, ValueError):
            return any(r["step"] >= step for r in self.records(stage) if "loss" in r)
        return False

    def json(self, name: str) -> dict:
        """A JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())


def torchrun(ranks: int) -> list[str]:
    """The launcher that `dtrain run` uses."""
    options = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "dtrain.torchrun", *options]


def environment(**more: str) -> dict[str, str]:
    """One thread per rank, no GPU."""
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **defaults, "PYTHONPATH": path, **more}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples and packed data, shared by all tests."""
    folder = os.environ.get("DTRAIN_CACHE")
    return Path(folder) if folder else tmp_path_factory.mktemp("cache")


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
def run_tiny(tmp_path: Path, cache: Path) -> Callable[..., Run]:
    """Run `tiny` with overrides under a launcher, in a folder of the test."""

    def run(
        *overrides: str,
        ranks: int = 2,
        launcher: Sequence[str] | None = None,
        folder: str = "run",
        options: Sequence[str] = (),
        worker: Sequence[str] = WORKER,
        expect: int | None = 0,
        evaluates: bool = True,
    ) -> Run:
        run_folder = tmp_path / folder
        quiet = ["evaluation.generation={}"]
        quiet += [] if evaluates else WITHOUT_EVALUATION
        command = [*(launcher or torchrun(ranks)), *worker, "tiny", *quiet, *overrides]
        command += [f"output.folder={run_folder}", *options]
        done = execute(command, cache)
        output = done.stdout + done.stderr
        assert expect is None or done.returncode == expect, output[-6000:]
        return Run(run_folder, done.returncode, output)

    return run


class Zygote:
    """Forks ranks; see zygote.py."""

    def __init__(self, cache: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            cwd=ROOT,
            env=environment(DTRAIN_CACHE=str(cache), COLUMNS="200"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        ranks: int,
        worker: str,
        arguments: Sequence[str],
        log: Path,
        env: dict[str, str] | None = None,
    ) -> list[int]:
        """Fork ranks that run `main` of the module `worker`; returns their process ids."""
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
        request = {"worker": worker, "arguments": list(arguments), "log": str(log)}
        return [
            self.ask(
                start={
                    **request,
                    "environment": common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                }
            )
            for rank in range(ranks)
        ]

    def run(self, ranks: int, worker: str, arguments: Sequence[str], log: Path) -> str:
        """Start ranks and wait for their success; returns what they printed."""
        pids = self.start(ranks, worker, arguments, log)
        statuses = [self.ask(wait=pid) for pid in pids]
        assert not any(statuses), log.read_text()[-6000:]
        return log.read_text()

    def ask(self, **request: object) -> int:
        """One request, one answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@dataclass
class Ranks(Run):
    """The ranks of one start, which may still run: real processes, without a launcher."""

    zygote: Zygote
    pids: list[int]
    log: Path

    def wait(self, *expected: int) -> Ranks:
        """Wait until all ranks have ended; check one status for all, or one for each."""
        statuses = [self.zygote.ask(wait=pid) for pid in self.pids]
        self.pids.clear()
        self.output = self.log.read_text()
        expected_statuses = list(expected) * (len(statuses) if len(expected) == 1 else 1)
        assert not expected_statuses or statuses == expected_statuses, self.output[-6000:]
        return self

    def kill(self, number: int = signal.SIGKILL) -> Ranks:
        """Signal all ranks."""
        for pid in self.pids:
            os.kill(pid, number)
        return self

    def until(self, happened: Callable[[], object], seconds: float = 60) -> None:
        """Wait until something has happened."""
        wait_until(happened, seconds, lambda: self.log.read_text()[-6000:])


def wait_until(
    happened: Callable[[], object], seconds: float, describe: Callable[[], str] = lambda: ""
) -> None:
    """Poll every few milliseconds; fail when it takes too long."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.005)


@pytest.fixture(scope="session")
def zygote(cache: Path) -> Iterator[Zygote]:
    """One process that has imported everything, from which ranks are forked."""
    server = Zygote(cache)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def start(tmp_path: Path, zygote: Zygote) -> Callable[..., str]:
    """start(ranks, worker, arguments) → what the test's own worker printed, a module here."""

    def run(ranks: int, worker: str, arguments: Sequence[str] = ()) -> str:
        log = tmp_path / f"{worker}.log"
        log.unlink(missing_ok=True)
        return zygote.run(ranks, worker, arguments, log)

    return run


@pytest.fixture
def start_ranks(tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., Ranks]]:
    """Start ranks of `tiny` with overrides; those still running at the end are killed.

    `dies_at`: a rank kills itself before its rename `dies_at_rename` to a path with this in it. A
    kill by the test may come too late, when the machine is busy.
    """
    started: list[Ranks] = []

    def start(
        *overrides: str,
        ranks: int = 2,
        folder: str | Path = "run",
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
        evaluates: bool = True,
        worker: str = "rank_worker",
        worker_arguments: Sequence[str] = (),
        dies_at: str | None = None,
        dies_at_rename: int = 1,
    ) -> Ranks:
        run_folder, log = tmp_path / folder, tmp_path / f"log-{len(started)}"
        if dies_at is not None:
            env = {**(env or {}), "DIES_AT": dies_at, "DIES_AT_RENAME": str(dies_at_rename)}
        arguments = [*worker_arguments, "tiny", "evaluation.generation={}", "device=cpu"]
        arguments += [*overrides] if evaluates else [*WITHOUT_EVALUATION, *overrides]
        arguments += [f"output.folder={run_folder}", *options]
        pids = zygote.start(ranks, worker, arguments, log, env)
        started.append(Ranks(run_folder, -1, "", zygote, pids, log))
        return started[-1]

    yield start
    for run in started:
        run.kill().wait()


@pytest.fixture
def start_stage(start_ranks: Callable[..., Ranks]) -> Callable[..., Ranks]:
    """start_stage(stage, held_out, overrides of the stage, …) → ranks of a run of this stage alone.

    `held_out` are the sources of the set `rows`, which is measured as the stage trains.
    """

    def start(
        stage: dict[str, Any],
        held_out: list[dict[str, Any]],
        *overrides: str,
        options: Sequence[str] = (),
        **more: Any,
    ) -> Ranks:
        train = {"global_batch_size": 4, "steps": 5, "learning_rate": 0.01}
        shared = {key: stage[key] for key in ("kind", "distill") if key in stage}
        rows = {**stage["data"], **shared, "sources": held_out}
        changes = [f"stages.task.{override}" for override in overrides]
        stages = [{"name": "task", "train": train, **stage}]
        whole = f"stages={json.dumps(stages)}", f"evaluation={json.dumps({'sets': {'rows': rows}})}"
        return start_ranks(*whole, *changes, options=options, **more)

    return start


@dataclass
class Live(Run):
    """A running `dtrain run`: a launcher and its workers, in their own process group."""

    process: subprocess.Popen[bytes]
    log: Path

    def worker(self, rank: int) -> psutil.Process | None:
        """The process of a rank; None if it has not started."""
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error, KeyError):
                    if child.environ()["RANK"] == str(rank):
                        return child
        return None

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until something has happened in the run."""

        def happened_in_time() -> object:
            assert self.process.poll() is None, self.log.read_text()
            return happened()

        wait_until(happened_in_time, TIMEOUT_SECONDS)

    def until_step(self, stage: str, step: int) -> None:
        """Wait until the metrics of a step are written."""
        self.until(lambda: self.is_at(stage, step))

    def wait(self, *expected: int) -> Live:
        """Wait for the end; check that the status is an expected one."""
        self.status = self.process.wait(TIMEOUT_SECONDS)
        self.output = self.log.read_text()
        assert not expected or self.status in expected, self.output[-6000:]
        return self


@pytest.fixture
def dtrain_run(tmp_path: Path, cache: Path) -> Iterator[Callable[..., Live]]:
    """Start `dtrain run tiny` on two ranks; processes still running at the end are killed."""
    started: list[Live] = []

    def start(*overrides: str, folder: str = "run", launcher: Sequence[str] = ()) -> Live:
        log = tmp_path / f"live-{len(started)}"
        command = list(launcher) or [sys.executable, "-m", "dtrain", "run"]
        command += ["tiny", "evaluation.generation={}", "device=cpu", *overrides]
        with open(log, "w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*command, f"output.folder={tmp_path / folder}"],
                cwd=ROOT,
                env=environment(DTRAIN_CACHE=str(cache), COLUMNS="200"),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell starts what runs in its background with SIGINT ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        started.append(Live(tmp_path / folder, -1, "", process, log))
        return started[-1]

    yield start
    for live in started:
        for process in (live.worker(0), live.worker(1), live.process):
            if process is not None:
                with suppress(psutil.Error):
                    process.kill()
        live.process.wait()
