"""Kill a sweep again and again at random moments, and compare its table with one never killed.

python tests/faults/sweep_kill.py [--trials 12] [--kills 2] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWEEP = """\
recipe: tiny
overrides:
  - device=cpu
  - launch.processes=1
  - evaluation.generation={{}}
  - stages.task.train.steps=6
  - stages.task.train.evaluate_every_steps=1
parameters:
  stages.task.train.learning_rate: log(1e-5, 1e-1)
  stages.task.method.r: [2, 4, 8]
search: {search}
prune: {prune}
trials: {trials}
at_once: 2
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start or continue a sweep."""
    command = [sys.executable, "-m", "dtrain", "sweep", str(folder.with_suffix(".yaml"))]
    with open(folder.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "--folder", str(folder)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )


def results(folder: Path) -> list[object]:
    """What must be the same: each trial's values, state, losses and number of evaluations."""
    record = json.loads((folder / "sweep.json").read_text())
    keys = ("number", "parameters", "state", "points", "rungs")
    return [
        [[t[key] for key in keys], [(r["value"], r["state"]) for r in t["runs"]]]
        for t in record["trials"]
    ]


def main() -> int:
    """Compare both sweeps; 1 if their tables differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--search", default="tpe")
    parser.add_argument("--prune", default="median")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        text = SWEEP.format(**vars(options))
        for folder in (whole, killed):
            folder.with_suffix(".yaml").write_text(text)
        began = time.monotonic()
        assert start(whole).wait() == 0, whole.with_suffix(".log").read_text()
        seconds = time.monotonic() - began
        for number in range(options.kills):
            process = start(killed)
            moment = chance.uniform(0.1, 0.9) * seconds / options.kills
            time.sleep(moment)
            process.kill()
            process.wait()
            record = json.loads((killed / "sweep.json").read_text())
            trials = [trial["state"] for trial in record["trials"]]
            print(f"kill {number + 1} after {moment:.1f} s; trials: {', '.join(trials) or 'none'}")
        assert start(killed).wait() == 0, killed.with_suffix(".log").read_text()
        is_same = results(whole) == results(killed)
        print(killed.with_suffix(".log").read_text().rpartition("ended\n")[2])
        print("the same table" if is_same else "ANOTHER TABLE")
        if not is_same:
            print(whole.with_suffix(".log").read_text().rpartition("ended\n")[2])
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
