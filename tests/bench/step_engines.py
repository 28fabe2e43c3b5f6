"""CPU of a step under each engine against ddp, two ranks of one thread each, in alternating runs.

    python tests/bench/step_engines.py DATA [ROUNDS] [STEPS]

SmolLM2-135M, LoRA, float32, 512 tokens a rank and step; DATA is a file of instructions. Two steps
warm up: once in a run, ZeRO-3 records its trace in the first and derives from it in the second what
to release when; their time is printed too. So is the loop's share of a step: all that is not
loading, computing or updating.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

ENGINES = ("ddp", "zero2", "fsdp2", "zero3")
WARM_UP = 2
MARK = "DTRAIN_BENCH"


def main(data: str, rounds: int = 3, steps: int = 4) -> None:
    results: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
    for _ in range(rounds):
        for engine in ENGINES:
            results[engine].append(run(engine, Path(data).absolute(), steps))
            cpu_seconds, loop, *first = results[engine][-1]
            print(f"{engine}: {cpu_seconds:.2f} CPU s a step, loop {loop:.2%};", end=" ")
            print("before:", *(f"{value:.2f}" for value in first), flush=True)
    for engine in ENGINES:
        ratios = [
            cpu_seconds[0] / ddp[0]
            for cpu_seconds, ddp in zip(results[engine], results["ddp"], strict=True)
        ]
        share = median(loop for _, loop, *_ in results[engine])
        print(f"{engine}: {median(ratios):.3f}x the CPU of ddp; the loop {share:.2%} of a step")


def run(engine: str, data: Path, steps: int) -> list[float]:
    """CPU seconds of a step on both ranks, the loop's share of it, the steps that warm up."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
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
        ranks = [json.loads(result_file.read_text()) for result_file in marks]
    cpu, loop, *first = zip(*ranks, strict=True)
    return [sum(cpu), median(loop), *map(sum, first)]


def recipe(engine: str, data: Path, steps: int, folder: Path) -> dict[str, object]:
    """A recipe of one stage."""
    stage = {
        "name": "stage", "kind": "sft", "method": {"kind": "lora", "dropout": 0.0},
        "data": {"sequence_length": 512, "sources": [{"path": str(data), "format": "alpaca"}]},
        "train": {"global_batch_size": 2, "steps": steps + WARM_UP + 1, "learning_rate": 1e-4},
    }  # fmt: skip
    return {
        "name": "engines", "device": "cpu", "stages": [stage], "engine": {"kind": engine},
        "model": {"base": "dtrain:smollm2-135m", "dtype": "float32"},
        "output": {"folder": str(folder / "run"), "merge": False},
    }  # fmt: skip


def rank(path: str) -> int:
    """One rank of a run, with a record of each step."""
    import time

    from dtrain import train
    from dtrain.core.lazy_import import import_fast

    import_fast("dtrain.rank_main")
    from dtrain.training import trainer

    plain, marks, inside = trainer.train_step, list[tuple[float, float]](), list[float]()

    def train_step(inputs, step, *args, **named):
        marks.append((time.process_time(), time.perf_counter()))
        if step == inputs.loader.steps - 1:
            cpu, wall = ([b - a for a, b in pairwise(clock)] for clock in zip(*marks, strict=True))
            shares = [1 - inner / whole for inner, whole in zip(inside, wall, strict=True)]
            measured = [mean(cpu[WARM_UP:]), median(shares[WARM_UP:])]
            result_file = Path(f"{os.environ[MARK]}-{os.environ['RANK']}")
            result_file.write_text(json.dumps([*measured, *cpu[:WARM_UP]]))
        result = plain(inputs, step, *args, **named)
        inside.append(sum(result.seconds.values()))
        return result

    trainer.train_step = train_step
    return train.main([path])


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        sys.exit(rank(sys.argv[2]))
    main(sys.argv[1], *map(int, sys.argv[2:]))
