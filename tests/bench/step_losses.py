"""Losses of fifty steps with kernels against those without: `step_losses.py DATA [TOKENS] [STEPS]`.

SmolLM2-135M, LoRA, float32; DATA is a file of instructions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

TOLERANCE = 1e-4


def losses(kernels: str, data: Path, tokens: int, steps: int, folder: Path) -> list[float]:
    """Loss of each step of a run of one stage."""
    stage = {
        "name": "stage", "kind": "sft", "method": {"kind": "lora", "dropout": 0.05},
        "data": {"sequence_length": tokens, "sources": [{"path": str(data), "format": "alpaca"}]},
        "train": {"global_batch_size": 1, "steps": steps, "learning_rate": 2e-4},
    }  # fmt: skip
    recipe = {
        "name": "losses", "device": "cpu", "stages": [stage],
        "model": {"base": "dtrain:smollm2-135m", "dtype": "float32", "kernels": kernels},
        "output": {"folder": str(folder / kernels), "merge": False},
    }  # fmt: skip
    path = folder / f"{kernels}.yaml"
    path.write_text(json.dumps(recipe))
    subprocess.run([sys.executable, "-m", "dtrain.train", str(path)], check=True, text=True)
    lines = (folder / kernels / "stage" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(data: str, tokens: int = 128, steps: int = 50) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        fast, plain = (
            losses(kernels, Path(data).absolute(), tokens, steps, path)
            for kernels in ("auto", "off")
        )
    apart = max(abs(a - b) for a, b in zip(fast, plain, strict=True))
    print(f"{len(fast)} steps, from {plain[0]:.3f} to {plain[-1]:.3f}: at most {apart:.1e} apart")
    return int(apart > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
