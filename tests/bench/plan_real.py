"""Compares `dtrain plan` with real ranks: peaks of tensors and bytes sent, for each engine.

    python tests/bench/plan_real.py MODEL_FOLDER [--tokens 256] [--only ddp,fsdp2] [--exact]

Two ranks under gloo run two steps of two micro-batches each, one case after another; the sum of
living storages of the fuller rank is compared with the plan's peak, and what the ranks received
with the plan's bytes. `--exact` simulates each case of ddp and fsdp2 as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dtrain.config.load import load_recipe
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import find_config, find_shape
from dtrain.planning.simulated_peak import simulate_step
from dtrain.planning.workload import Cluster

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "plan_worker.py"
RANKS = 2
METHODS = {
    "full": "{kind: full}",
    "lora": "{kind: lora, r: 16, dropout: 0.05}",
    "qlora": "{kind: qlora, r: 16, dropout: 0.0}",
}
Case = tuple[str, str, str]  # engine, method, checkpointing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", default="256")
    parser.add_argument("--only", default="ddp,fsdp2,zero2,zero3")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("overrides", nargs="*", help="such as model.dtype=bfloat16")
    arguments = parser.parse_args()
    cases = [
        (engine, method, checkpointing)
        for engine in arguments.only.split(",")
        for method in METHODS
        for checkpointing in ("false", "true")
    ]
    words = [overrides(arguments, case) for case in cases]
    print(f"{'engine':<8}{'method':<7}{'ckpt':<6}{'peak MB':>9}{'plan':>9}{'off':>8}", end="")
    print(f"{'less buckets':>14}{'received MB':>13}{'plan':>9}{'off':>8}{'exact':>9}{'off':>8}")
    for case, case_overrides, real in zip(cases, words, measured(words), strict=True):
        report(case, case_overrides, real, exact=arguments.exact and case[0] in ("ddp", "fsdp2"))


def overrides(arguments: argparse.Namespace, case: Case) -> list[str]:
    """A recipe's keys for a case."""
    engine, method, checkpointing = case
    return [
        f"model.base={arguments.model}",
        "device=cpu",
        f"engine.kind={engine}",
        f"model.gradient_checkpointing={checkpointing}",
        f"stages.domain.method={METHODS[method]}",
        f"stages.domain.data.sequence_length={arguments.tokens}",
        "stages.domain.train.global_batch_size=4",
        *arguments.overrides,
    ]


def measured(cases: list[list[str]]) -> Iterator[dict]:
    """What real ranks did, case by case."""
    command = [sys.executable, "-m", "dtrain.torchrun", "--standalone", "--nproc-per-node"]
    words = [word for case in cases for word in ("+", *case)][1:]
    child = subprocess.Popen(
        [*command, str(RANKS), str(WORKER), *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with child:
        assert child.stdout
        for line in child.stdout:
            if line.startswith("FACTS "):
                yield json.loads(line.removeprefix("FACTS "))
    assert child.returncode == 0, child.returncode


def report(case: Case, words: list[str], real: dict, *, exact: bool) -> None:
    """A line of the table."""
    recipe, (engine, method, checkpointing) = load_recipe("tiny", words), case
    shape, _ = find_shape(recipe.model.base)
    cluster = Cluster(find_gpu("h100-80g"), 1, RANKS)
    workload = build_workload(recipe, recipe.stages[0], shape, cluster)
    model, peak = build_engine_model(workload), max(real["phases"].values())
    plan = model.peak_memory()
    sent, planned = sum(real["received"].values()), model.received_bytes()
    line = f"{engine:<8}{method:<7}{checkpointing:<6}{peak / 1e6:>9.1f}{plan.peak / 1e6:>9.1f}"
    line += f"{plan.peak / peak - 1:>8.2%}"
    line += f"{(plan.peak - plan.buffers) / (peak - plan.buffers) - 1:>14.2%}"
    line += f"{sent / 1e6:>13.2f}{planned / 1e6:>9.2f}{planned / sent - 1:>8.2%}"
    if exact:
        config = find_config(recipe.model.base)[0]
        simulated = simulate_step(recipe, "domain", workload, config, lambda done: None).peak.total
        line += f"{simulated / 1e6:>9.1f}{simulated / peak - 1:>8.2%}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
