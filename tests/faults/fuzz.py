"""Mutated files for every command that reads one: an error for the user, and nothing else.

    python tests/faults/fuzz.py [--seed S] [--first N] [--count N] [--minutes M] [--only TEXT]

Small real files (a run, a base, adapters, rows, recipes, …) are changed at random (`mutations.py`)
and given to the command that reads them. It may succeed, or raise a UserError. A traceback, more
than 5 s of CPU, or 1 GB of memory beyond the libraries is a failure; its file is kept. The exit
status is 1 if there was one. Case N of a seed is always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from inputs import build_inputs
from mutations import mutate

CPU_SECONDS = 5.0
WALL_SECONDS = 60.0  # on a busy machine, and for what sleeps
MEMORY_BYTES = 1 << 30
BATCH = 500  # cases of one process: what libraries keep must not count as a case's memory


@dataclass(frozen=True)
class Case:
    """A command and the files that it reads; one of them is changed."""

    files: tuple[str, ...]
    command: tuple[str, ...]


RUN = (
    "run/recipe.yaml", "run/lineage.json", "run/evaluation.json", "run/outcome.json",
    "run/starts.jsonl", "run/domain/metrics.jsonl", "run/task/metrics.jsonl",
    "run/predictions/base.jsonl", "run/domain/stage.json", "run/slurm/attempts.json",
)  # fmt: skip
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
BASE = ("base/config.json", "base/model.safetensors")
SHARDED = ("sharded/model.safetensors.index.json", "sharded/config.json", "sharded/a.safetensors")
CODED = ("coded/config.json", "coded/model.safetensors")
CHAT = ("base/tokenizer.json", "base/tokenizer_config.json", "base/generation_config.json",
        "base/chat_template.jinja", "base/config.json", *ADAPTER)  # fmt: skip
STEP = "run/domain/checkpoints/step-000002"
SAVED = (f"{STEP}/manifest.json", f"{STEP}/rank-00000.safetensors", "run/domain/stage.json",
         "run/recipe.yaml", "run/lineage.json")  # fmt: skip
ROWS = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt", "rows.jsonl.gz",
        "rows.parquet", "rows.arrow", "talks.jsonl", "pairs.jsonl")  # fmt: skip

CASES = [
    *(Case((name,), ("check", name)) for name in ("recipe.yaml", "many.yaml")),
    Case(("ds.json", "zero.yaml"), ("check", "zero.yaml")),
    Case(("rows.jsonl", "talks.jsonl", "pairs.jsonl"), ("check", "many.yaml")),
    Case((*BASE[:1], "recipe.yaml"), ("plan", "recipe.yaml")),
    Case(BASE[:1], ("check", "recipe.yaml")),
    Case(("cache/calibration.jsonl",), ("plan", "recipe.yaml", "--gpu", "cpu")),
    Case(RUN, ("report", "run")),
    Case(RUN, ("compare", "run", "other")),
    Case(RUN, ("watch", "--once", "run")),
    Case(RUN, ("watch", "--json", "run")),
    Case((*RUN, "run/slurm/jobs.json", "run/slurm/attempts.json"), ("status", "run")),
    Case(("run/slurm/attempts.json", "run/slurm/jobs.json"), ("logs", "run")),
    Case((*SAVED, "run/task/metrics.jsonl"), ("checkpoints", "run", "--verify")),
    Case((*RUN, "run/domain/adapter/adapter_config.json"), ("adapters", "run")),
    Case((*RUN, "run/task/merged/merge.json"), ("serve", "run")),
    Case((*ADAPTER, *ADAPTER), ("adapters", ".")),
    Case((*BASE, "run/task/merged/merge.json"), ("verify", "base")),
    Case(("run/task/merged/merge.json", "run/task/merged/model.safetensors"),
         ("verify", "run/task/merged")),
    Case(SHARDED, ("verify", "sharded")),
    Case(SHARDED, ("diff", "sharded", "base")),
    Case(CODED, ("verify", "coded")),
    Case(CODED, ("diff", "coded", "base")),
    Case((*ADAPTER, *CODED), ("merge", "coded", "adapter", "out", "--processes", "1")),
    Case(ADAPTER, ("diff", "adapter", "run/task/adapter")),
    Case((*ADAPTER, *BASE), ("merge", "base", "adapter", "out", "--processes", "1")),
    Case((*ADAPTER, *SHARDED), ("merge", "sharded", "adapter", "out", "--processes", "1")),
    Case((*ADAPTER, "base/generation_config.json", "base/tokenizer_config.json"),
         ("merge", "base", "adapter", "run/task/adapter", "out", "--combine", "linear")),
    Case(SAVED, ("merge", STEP, "out", "--processes", "1")),
    Case((*ADAPTER, "run/domain/stage.json"), ("combine", "adapter", "run/domain/adapter", "out")),
    *(Case((name,), ("data", "show", name)) for name in ROWS),
    Case(ROWS[:5], ("data", "scan", "rows.jsonl", "--processes", "1")),
    Case(("prompts.jsonl", *CHAT, "out.jsonl"),
         ("generate", "adapter", "--in", "prompts.jsonl", "--out", "out.jsonl",
          "--max-new-tokens", "2")),
    Case(("base/tokenizer.json", "base/tokenizer_config.json", "base/chat_template.jinja",
          "talks.jsonl", "rows.jsonl", "recipe.yaml"), ("data", "show", "recipe.yaml", "-n", "1")),
    Case(("sweep.yaml", "recipe.yaml", "sweep/sweep.json"), ("sweep", "sweep.yaml", "--dry-run")),
    Case(("recipe.yaml", "rows.jsonl"), ("submit", "recipe.yaml", "--dry-run")),
]  # fmt: skip


def main() -> int:
    """Try cases in processes with limits; count and print what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", default="", help="words that the command must contain")
    parser.add_argument("--keep", type=Path, help="folder of the inputs and of what failed")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="dtrain-fuzz-"))
    if arguments.worker is not None:
        return Worker(folder.resolve(), arguments).run()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "inputs" / "run").exists():
        build_inputs(folder / "inputs")
    return supervise(folder, arguments)


def supervise(folder: Path, arguments: argparse.Namespace) -> int:
    """Restart the worker behind each case that ended it."""
    failed, number, ends = 0, arguments.first, time.monotonic() + 60 * arguments.minutes
    last, log = arguments.first + arguments.count, folder / "worker.log"
    while number < last and time.monotonic() < ends:
        command = [sys.executable, __file__, "--worker", str(number), "--keep", str(folder),
                   "--seed", str(arguments.seed), "--count", str(min(BATCH, last - number)),
                   "--minutes", str((ends - time.monotonic()) / 60),
                   "--only", arguments.only]  # fmt: skip
        with open(log, "wb") as errors:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False)
        for line in done.stdout.decode(errors="replace").splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "done":
                number = int(rest) + 1
            elif kind == "failed":
                failed += 1
                print(rest, flush=True)
        if done.returncode:
            failed += 1
            tail = "\n".join(log.read_text(errors="replace").split("\n")[-40:])
            print(f"case {number}: the worker ended with {done.returncode}\n{tail}", flush=True)
            number += 1
    tried = number - arguments.first
    print(f"seed {arguments.seed}: {tried} cases from {arguments.first}, {failed} failed; {folder}")
    return 1 if failed else 0


class Worker:
    """Runs cases one after the other in this process."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.seed, self.first = folder, arguments.seed, arguments.worker
        self.count, self.seconds = arguments.count, 60 * arguments.minutes
        self.cases = [case for case in CASES if arguments.only in " ".join(case.command)]
        self.sandbox = folder / "sandbox"

    def run(self) -> int:
        """Run the cases from the first on."""
        os.environ.update(environment(self.sandbox))
        self._refresh()
        os.chdir(self.sandbox)
        from dtrain.cli.root import app  # the first of many imports

        self.app: Any = app
        self._warm_up()
        self._limit_memory()
        ends = time.monotonic() + self.seconds
        for number in range(self.first, self.first + self.count):
            if time.monotonic() > ends:
                break
            self._try(number)
            say(f"done {number}")
        return 0

    def _refresh(self) -> None:
        shutil.rmtree(self.sandbox, ignore_errors=True)
        shutil.copytree(self.folder / "inputs", self.sandbox, symlinks=True)

    def _warm_up(self) -> None:
        """Import what the commands import, before time and memory are counted."""
        for case in self.cases:
            if error := self._command(case):
                raise SystemExit(f"{' '.join(case.command)} with unchanged files: {error}")
            self._clean()

    def _limit_memory(self) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, -1))

    def _try(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        case = rng.choice(self.cases)
        path = self.sandbox / rng.choice(case.files)
        original = path.read_bytes()
        changed = mutate(path, rng)
        path.write_bytes(changed)
        (self.folder / "current").write_bytes(changed)
        sys.stderr.seek(0)  # the worker's log begins with the case that ended it
        sys.stderr.truncate()
        print(f"case {number}: {' '.join(case.command)}, {path.name}", file=sys.stderr, flush=True)
        error = self._command(case)
        path.write_bytes(original)
        self._clean()
        if error:
            self._keep(number, case, path, changed, error)

    def _keep(self, number: int, case: Case, path: Path, changed: bytes, error: str) -> None:
        where = path.relative_to(self.sandbox)
        kept = self.folder / "failed" / f"{self.seed}-{number}-{where.name}"
        kept.parent.mkdir(exist_ok=True)
        kept.write_bytes(changed)
        text = f"case {number}: {' '.join(case.command)} with {where}"
        kept.with_name(kept.name + ".txt").write_text(f"{text}\n{error}", "utf-8", "replace")
        say(f"failed {text}: {signature(error)}")

    def _command(self, case: Case) -> str:
        """The traceback of a command, or an empty text."""
        from dtrain.core.errors import UserError

        faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
        faulthandler.register(signal.SIGPROF, chain=True)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                self.app([*case.command], standalone_mode=False)
        except (UserError, SystemExit):
            pass
        except BaseException as error:
            if not type(error).__module__.startswith(("click", "typer")):
                return traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
        return ""

    def _clean(self) -> None:
        """Remove what a command wrote."""
        for name in ("out", ".out.making"):
            shutil.rmtree(self.sandbox / name, ignore_errors=True)
        out = self.sandbox / "out.jsonl"
        out.write_bytes((self.folder / "inputs" / "out.jsonl").read_bytes())


def signature(error: str) -> str:
    """Where in dtrain an error was raised, and its first words."""
    calls = re.findall(r'/(dtrain/[^"]*)", line (\d+), in (\w+)', error)
    location = ":".join(calls[-1]) if calls else ""
    return f"{location} {error.strip().split(chr(10))[-1][:120]}"


def environment(sandbox: Path) -> dict[str, str]:
    """What a worker sees: its own cache, and a Slurm with an empty queue."""
    return {
        "DTRAIN_CACHE": str(sandbox / "cache"),
        "PATH": f"{sandbox / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }


def say(text: str) -> None:
    """Report to the supervisor."""
    os.write(1, (text + "\n").encode(errors="backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
