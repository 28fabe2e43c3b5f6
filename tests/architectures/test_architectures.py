"""A dozen families or so, each unlike the others, get what table.txt says; all types are in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SECONDS = 600
# What is unlike: fused matrices, tied and capped heads, two kinds of attention, alibi, rope by
# length, no sdpa, transposed layers, nested experts, states over a sequence, an image tower, a
# decoder that is none, parts that the loss does not reach. What llama's line says,
# tests/distributed shows: test_golden.py of engines, kernels and methods, test_methods.py against
# PEFT and transformers.
FAMILIES = [
    "bert",
    "bloom",
    "blt",
    "dbrx",
    "falcon+alibi",
    "gemma2",
    "gemma3",
    "gemma4_text",
    "gpt2",
    "phi3+longrope",
    "qwen3_5_text",
    "qwen3_moe",
]


def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "sweep.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.timeout(SECONDS)
def test_families_match_the_table(tmp_path: Path) -> None:
    assert os.environ.get("OMP_NUM_THREADS", "1") == "1", "forks would fight for the cores"
    done = sweep("--results", str(tmp_path), *FAMILIES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"/{len(FAMILIES)}] ") == len(FAMILIES), done.stdout


def test_every_type_is_in_the_table() -> None:
    done = sweep("--missing")
    assert done.returncode == 0, done.stdout + done.stderr
