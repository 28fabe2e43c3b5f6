"""What a training step costs against TRL's SFTTrainer, in alternating runs of one process each.

    python tests/bench/step_speed.py DATA [--method lora|full|qlora|dora|qdora] [--kind sft|cpt|dpo]
        [--tokens 1024] [--dropout 0] [--checkpointing] [--pairs 5] [--steps 3]
        [--peers packed padded plain peft dpo]

DATA is a file of instructions (sft), of plain text (cpt) or of pairs with prompt, chosen and
rejected (dpo, against the peer of that name; both compute the reference before the steps). Each
run trains SmolLM2-135M in float32 on two threads; its first step warms up, unless --steps is 0:
then it is what is measured. "bound"
is the time in which this machine's matrix products alone, each at the best rate seen here, do the
arithmetic that no implementation can leave out. plain: dtrain without kernels. peft: dtrain with
PEFT's own DoRA layers, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

THREADS = os.environ.get("BENCH_THREADS", "2")
RUNNERS = {
    "dtrain": "step_speed_dtrain.py",
    "plain": "step_speed_dtrain.py",
    "peft": "step_speed_dtrain.py",
    "packed": "step_speed_trl.py",
    "padded": "step_speed_trl.py",
    "dpo": "step_speed_trl_dpo.py",
}
METHODS = ["lora", "full", "qlora", "dora", "qdora"]
Found = dict[str, Any]


def main() -> None:
    arguments = parse(sys.argv[1:])
    names = ["dtrain", *arguments.peers]
    runs: dict[str, list[Found]] = {name: [] for name in names}
    for number in range(arguments.pairs):
        for name in names:
            runs[name].append(run(name, arguments))
            show(number, name, runs[name][-1])
    for name in names[1:]:
        compare(name, runs["dtrain"], runs[name])
    bounds = [result["bound"] for result in runs["dtrain"] if "bound" in result]
    if bounds:
        print(f"share of the bound: {median(bounds):.2f}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--kind", choices=["sft", "cpt", "dpo"], default="sft")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    parser.add_argument("--checkpointing", action="store_true", help="of both sides")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=["packed"], choices=list(RUNNERS)[1:])
    return parser.parse_args(argv)


def run(name: str, arguments: argparse.Namespace) -> Found:
    """One process; what it wrote of itself, and its peak memory."""
    script = Path(__file__).with_name(RUNNERS[name])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = {**vars(arguments), "data": str(arguments.data.absolute()), "name": name}
        job |= {"folder": folder, "result": str(result)}
        # A thread that waits for one that other processes hold up shall not count as computing.
        variables = {"OMP_NUM_THREADS": THREADS, "OMP_WAIT_POLICY": "passive"}
        environment = {**os.environ, **variables, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), json.dumps(job)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        facts: Found = json.loads(result.read_text())
    return facts


def add(job: Found, **more: Any) -> None:
    """Write down more of a run."""
    path = Path(job["result"])
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def finish(job: Found, marks: list[Found]) -> None:
    """Write down what a run measured.

    Args:
        marks: CPU and wall clock before each step and after the last, and the step's tokens.
    """
    measured = marks[1:] if len(marks) > 2 else marks
    cpu, wall = (measured[-1][clock] - measured[0][clock] for clock in ("cpu", "wall"))
    tokens = sum(record["tokens"] for record in measured[:-1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {"per_cpu": tokens / cpu, "per_wall": tokens / wall, "peak": peak}
    Path(job["result"]).write_text(json.dumps(facts))


def show(number: int, name: str, facts: Found) -> None:
    share = f", {facts['bound']:.2f} of the bound" if "bound" in facts else ""
    print(
        f"{number + 1} {name:7} {facts['per_cpu']:6.1f} tokens per CPU second, "
        f"{facts['per_wall']:6.1f} per second, peak {facts['peak'] / 1e9:.2f} GB{share}",
        flush=True,
    )


def compare(peer: str, ours: list[Found], theirs: list[Found]) -> None:
    """Medians of the ratios of neighbouring runs."""
    pairs = list(zip(ours, theirs, strict=True))
    cpu, wall, peak = (
        median(a[key] / b[key] for a, b in pairs) for key in ("per_cpu", "per_wall", "peak")
    )
    print(f"against {peer}: {cpu:.2f}x per CPU second, {wall:.2f}x per second, {peak:.2f}x memory")


if __name__ == "__main__":
    main()
