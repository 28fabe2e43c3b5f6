"""CPU of a step under each engine against ddp, two ranks of one thread each, in alternating runs.

    python tests/bench/step_engines.py DATA [ROUNDS] [STEPS]

SmolLM2-135M, LoRA, float32, 512 tokens a rank and step; DATA is a file of instructions. Beside it
what the loop itself takes of a step: all that is not loading, computing or updating.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

ENGINES = ("ddp", "zero2", "fsdp2", "zero3")
MARK = "DTRAIN_BENCH"


def main(data: str, rounds: int = 3, steps: int = 4) -> None:
    found: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine in ENGINES:
            found[engine].append(run(engine, Path(data).absolute(), steps))
            print(engine, *(f"{value:.4f}" for value in found[engine][-1]), flush=True)
    for engine in ENGINES:
        ratios = [own[0] / ddp[0] for own, ddp in zip(found[engine], found["ddp"], strict=True)]
        share = median(loop for _, loop in found[engine])
        print(f"{engine}: {median(ratios):.3f}x the CPU of ddp; the loop {share:.2%} of a step")


def run(engine: str, data: Path, steps: int) -> tuple[float, float]:
    """CPU seconds of a step on both ranks, and the loop's share of it."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = folder / "recipe.json"
        path.write_text(json.dumps(recipe(engine, data, steps, folder)))
        command = [sys.executable, "-m", "dtrain.torchrun", "--standalone", "--nproc-per-node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder / "rank")}
        done = subprocess.run(
            [*command, __file__, "--rank", str(path)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        marks = [folder / f"rank-{rank}" for rank in range(2)]
        assert all(m.exists() for m in marks), done.stdout[-2000:] + done.stderr[-4000:]
        ranks = [json.loads(mark.read_text()) for mark in marks]
    return sum(cpu for cpu, _ in ranks), median(loop for _, loop in ranks)


def recipe(engine: str, data: Path, steps: int, folder: Path) -> dict[str, object]:
    """A recipe of one stage."""
    stage = {
        "name": "stage", "kind": "sft", "method": {"kind": "lora", "dropout": 0.0},
        "data": {"sequence_tokens": 512, "sources": [{"path": str(data), "format": "alpaca"}]},
        "train": {"global_batch_sequences": 2, "steps": steps + 2, "learning_rate": 1e-4},
    }  # fmt: skip
    return {
        "name": "engines", "device": "cpu", "stages": [stage], "engine": {"kind": engine},
        "model": {"base": "dtrain:smollm2-135m", "dtype": "float32"},
        "output": {"folder": str(folder / "run"), "merge": False},
    }  # fmt: skip


def rank(path: str) -> int:
    """One rank of a run, with a mark at each step; the first step warms up."""
    import time

    from dtrain import train
    from dtrain.core.imports import import_fast

    import_fast("dtrain.worker")
    from dtrain.stages import loop

    plain, marks, inside = loop.train_step, list[tuple[float, float]](), list[float]()

    def train_step(job, step, *args, **named):
        marks.append((time.process_time(), time.perf_counter()))
        if step == job.loader.steps - 1:
            spans = [b - a for (_, a), (_, b) in pairwise(marks[1:])]
            cpu = (marks[-1][0] - marks[1][0]) / len(spans)
            outside = median(1 - own / all_ for own, all_ in zip(inside[1:], spans, strict=True))
            place = Path(f"{os.environ[MARK]}-{os.environ['RANK']}")
            place.write_text(json.dumps([cpu, outside]))
        result = plain(job, step, *args, **named)
        inside.append(sum(result.seconds.values()))
        return result

    loop.train_step = train_step
    return train.main([path])


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        sys.exit(rank(sys.argv[2]))
    main(sys.argv[1], *map(int, sys.argv[2:]))
