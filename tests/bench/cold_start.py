"""What a start costs: imports against those of TRL's trainer, and the way to a run's first step.

    python tests/bench/cold_start.py [PAIRS]

The way of `tiny` from the command to its first step, and of the quickstart's stage where data,
model and the base's losses are there already; the latter against as many processes as it has ranks,
each of which imports torch, transformers and PEFT and loads the model. A way ends where the step
begins.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from dtrain.core.cache_paths import sample_folder

WORKER = "from dtrain.core.lazy_import import import_fast; import_fast('dtrain.rank_main')"
TRL = "from trl import SFTTrainer"
BARE = (
    "import sys, torch, transformers, peft\n"
    "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)"
)
RANKS = 2
LOOK_EVERY = 0.01  # seconds


def main(pairs: int = 5) -> None:
    imports(pairs)
    with tempfile.TemporaryDirectory() as folder:
        show("tiny", [time_run("tiny", Path(folder) / f"tiny-{n}") for n in range(pairs + 1)][1:])
        run = Path(folder) / "quickstart"
        time_run("quickstart", run)  # data and model are made, the base is measured
        timings = [(time_run("quickstart", run), bare()) for _ in range(pairs)]
        show("quickstart, again", [ours for ours, _ in timings])
        seconds = median(theirs for _, theirs in timings)
        ratio = median(ours["first step"] / theirs for ours, theirs in timings)
        print(f"imports and model alone {seconds:.2f} s: {ratio:.2f}x")


def imports(pairs: int) -> None:
    """CPU of what a worker imports against that of TRL's trainer, in alternating runs."""
    cpu_seconds(WORKER), cpu_seconds(TRL)  # warms the page cache
    timings = [(cpu_seconds(WORKER), cpu_seconds(TRL)) for _ in range(pairs)]
    worker, trl = (median(times) for times in zip(*timings, strict=True))
    ratio = median(a / b for a, b in timings)
    print(f"imports of a worker {worker:.2f} CPU s, of TRL's trainer {trl:.2f}: {ratio:.2f}x")


def cpu_seconds(program: str) -> float:
    """CPU seconds of a Python that runs `program`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bare() -> float:
    """Seconds until all of some processes have imported the libraries and loaded the model."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", BARE, str(sample_folder("smollm2-135m"))]
    started = time.time()
    several = [
        subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(RANKS)
    ]
    assert [process.wait() for process in several] == [0] * RANKS
    return time.time() - started


def time_run(recipe: str, run: Path) -> dict[str, float]:
    """Seconds from the command to each mark on the way to the first step; the run is then killed.

    Nothing was saved by then, so the same command starts at the same step again.
    """
    command = [str(Path(sys.executable).with_name("dtrain")), "run", recipe, f"output.folder={run}"]
    command += [f"launch.processes={RANKS}"]
    metrics = run / "domain" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    log = run.with_suffix(".log")
    with log.open("w") as out:
        started = time.time()
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        marks = {}
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert process.poll() is None, log.read_text()[-2000:]
            for text, event in (("stage domain", "base loaded"), ("rows of", "engine built")):
                if event not in marks and text in log.read_text():
                    marks[event] = time.time() - started
            time.sleep(LOOK_EVERY)
    line = json.loads(metrics.read_text().splitlines()[0])
    first = metrics.stat().st_mtime - started - sum(line["seconds"].values())
    launched, imported = (
        (run / name).stat().st_mtime - started for name in (".lock", "recipe.yaml")
    )
    end(process)
    return {"recipe checked": launched, "ranks up": imported, **marks, "first step": first}


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher; its ranks die with it."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def show(name: str, timings: list[dict[str, float]]) -> None:
    """The medians of some starts."""
    text = ", ".join(
        f"{event} {median(timing[event] for timing in timings):.2f}" for event in timings[0]
    )
    print(f"{name}, seconds after the command: {text}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
