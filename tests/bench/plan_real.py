"""`dtrain plan` against real ranks: tensor-level peaks and bytes sent, engine by engine.

    python tests/bench/plan_real.py MODEL_FOLDER [--tokens 256] [--only ddp,fsdp2]

Two ranks under gloo run two steps of two micro-batches each; the sum of living storages is
compared with the plan's peak, and what the ranks received with the plan's bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from dtrain.config.load import load_recipe
from dtrain.planning.bases import find_shape
from dtrain.planning.gpus import find_gpu
from dtrain.planning.memory import memory_of
from dtrain.planning.setup import Cluster, setup_of
from dtrain.planning.wire import received_bytes

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "plan_worker.py"
RANKS = 2
METHODS = {
    "full": "{kind: full}",
    "lora": "{kind: lora, r: 16, dropout: 0.05}",
    "qlora": "{kind: qlora, r: 16, dropout: 0.0}",
}


def measure(overrides: list[str]) -> dict:
    """What real ranks did."""
    command = [sys.executable, "-m", "dtrain.torchrun", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, str(RANKS), str(WORKER), *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(x for x in done.stdout.splitlines() if x.startswith("FACTS "))
    return json.loads(line.removeprefix("FACTS "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", default="256")
    parser.add_argument("--only", default="ddp,fsdp2,zero2,zero3")
    arguments = parser.parse_args()
    print(f"{'engine':<8}{'method':<7}{'ckpt':<6}{'peak MB':>9}{'plan':>9}{'off':>8}", end="")
    print(f"{'less buckets':>14}{'received MB':>13}{'plan':>9}{'off':>8}")
    for engine in arguments.only.split(","):
        for method, text in METHODS.items():
            for checkpointing in ("false", "true"):
                overrides = [
                    f"model.base={arguments.model}",
                    "device=cpu",
                    f"engine.kind={engine}",
                    f"model.gradient_checkpointing={checkpointing}",
                    f"stages.domain.method={text}",
                    f"stages.domain.data.sequence_tokens={arguments.tokens}",
                    "stages.domain.train.global_batch_sequences=4",
                ]
                report(engine, method, checkpointing, overrides)


def report(engine: str, method: str, checkpointing: str, overrides: list[str]) -> None:
    recipe, real = load_recipe("tiny", overrides), measure(overrides)
    shape, _ = find_shape(recipe.model.base)
    setup = setup_of(recipe, recipe.stages[0], shape, Cluster(find_gpu("h100-80g"), 1, RANKS))
    plan, peak = memory_of(setup), max(v for k, v in real["phases"].items() if k != "rest")
    sent, planned = sum(real["received"].values()), received_bytes(setup)
    line = f"{engine:<8}{method:<7}{checkpointing:<6}{peak / 1e6:>9.1f}{plan.peak / 1e6:>9.1f}"
    line += f"{plan.peak / peak - 1:>8.2%}"
    line += f"{(plan.peak - plan.buffers) / (peak - plan.buffers) - 1:>14.2%}"
    line += f"{sent / 1e6:>13.2f}{planned / 1e6:>9.2f}{planned / sent - 1:>8.2%}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
