"""Cost of a checkpoint at every step, on the quickstart's model and data.

    python tests/bench/checkpoint_cost.py [--blocks 3] [--steps 8] [--ranks 2] [OVERRIDE ...]

Blocks of steps with a save after each step and blocks without take turns, in two runs: what one
saves in, the other does not, because rows and so steps differ from block to block. A block with
saves ends when its last save is on the disk, so that none of its work falls into the next block.
The speed kept is the time of a block without saves over that of its neighbour with them, in wall
time and in CPU seconds of all ranks: the geometric mean of the two runs' medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]
MIN_RATIO = 0.97


def main() -> int:
    """Start the ranks on themselves, twice; print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=3, help="pairs of blocks in a run")
    parser.add_argument("--steps", type=int, default=8, help="steps of a block")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="such as stages.domain.method.r=16")
    arguments = parser.parse_args()
    kept = [run(arguments, phase) for phase in (0, 1)]
    means = {name: sqrt(kept[0][name] * kept[1][name]) for name in ("wall", "cpu")}
    print(f"speed kept: wall {means['wall']:.3f}, cpu {means['cpu']:.3f}")
    return 0 if min(means.values()) >= MIN_RATIO else 1


def run(arguments: argparse.Namespace, phase: int) -> dict[str, float]:
    """One run: saves in the first block of each pair (phase 0), or in the second."""
    folder = Path(tempfile.mkdtemp(prefix="dtrain-cost-"))
    steps = arguments.steps * (2 * arguments.blocks + 1) + 1
    command = [sys.executable, "-m", "dtrain.torchrun", "--standalone"]
    command += [f"--nproc-per-node={arguments.ranks}", __file__, "--rank"]
    overrides = ["quickstart", *arguments.overrides, f"output.folder={folder}/run"]
    overrides += ["evaluation={sets: {}}", "stages.domain.train.checkpoint_every_steps=1"]
    overrides += [f"stages.domain.train.steps={steps}", "output.merge=false"]
    times = {"DTRAIN_BENCH": f"{folder}/times", "DTRAIN_BENCH_STEPS": str(arguments.steps)}
    paths = {"PYTHONPATH": str(ROOT), "DTRAIN_BENCH_PHASE": str(phase)}
    done = subprocess.run([*command, *overrides], env={**os.environ, **times, **paths})
    assert done.returncode == 75, done.returncode
    return report_costs(folder, arguments.steps, phase)


def report_costs(folder: Path, block: int, phase: int) -> dict[str, float]:
    """Medians from the records of all ranks, one at the end of each step."""
    files = sorted(folder.glob("times-*"))
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    wall = [record["wall"] for record in records[0]]
    cpu = [sum(record["cpu"] for record in row) for row in zip(*records, strict=True)]
    kept = {}
    for name, series in (("wall", wall), ("cpu", cpu)):
        ends = series[block - 1 :: block]  # the first block warms up
        spans = [b - a for a, b in pairwise(ends)]
        saving, plain = spans[phase::2], spans[1 - phase :: 2]
        ratios = [p / s for s, p in zip(saving, plain, strict=True)]
        ratios_text = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"{name}: a step with a save {median(saving) / block:.3f} s, without "
            f"{median(plain) / block:.3f} s; speed kept by pairs: {ratios_text}",
            flush=True,
        )
        kept[name] = median(ratios)
    return kept


def rank(argv: list[str]) -> int:
    """One rank: the run itself, with saves in every other block, and a record after each step."""
    from dtrain import train
    from dtrain.training import checkpointer, trainer

    block, phase = (int(os.environ[f"DTRAIN_BENCH_{name}"]) for name in ("STEPS", "PHASE"))
    path = Path(f"{os.environ['DTRAIN_BENCH']}-{os.environ['RANK']}")
    plain_train_step, savers = trainer.train_step, list[Any]()
    plain_save = checkpointer.Checkpointer.save

    def saves(step: int) -> bool:
        number = (step - 1) // block  # step counts from 1; the first block warms up
        return number > 0 and number % 2 != phase

    def save(self: Any, engine: Any, stage: Any, loss: float | None) -> None:
        savers[:] = [self]
        if saves(stage.step):
            plain_save(self, engine, stage, loss)

    def train_step(inputs: Any, step: int, *args: Any, **named: Any) -> Any:
        if step:
            write_record(step)
        if step == inputs.loader.steps - 2:
            inputs.stop = SimpleNamespace(
                is_set=lambda *_: True
            )  # with the next step, the stage's last
        return plain_train_step(inputs, step, *args, **named)

    def write_record(step: int) -> None:
        if saves(step) and step % block == 0:
            savers[0].wait_for_save()
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"wall": time.perf_counter(), "cpu": sum(os.times()[:2])}) + "\n")

    trainer.train_step = train_step
    checkpointer.Checkpointer.save = save  # type: ignore[method-assign]
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(rank(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main())
