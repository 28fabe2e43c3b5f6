"""A finished run of two LoRA stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.config.load import dump, load_recipe

ROOT = Path(__file__).parents[3]
QUICK = [
    "evaluation={}",
    "model.dtype=auto",
    "stages.domain.train.steps=4",
    "stages.task.train.steps=3",
    "stages.domain.train.evaluate_every_steps=null",
    "stages.task.train.evaluate_every_steps=null",
    "stages.domain.train.evaluate_on=null",
    "stages.task.train.evaluate_on=null",
]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of a subprocess."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A finished run of `tiny`: domain (rank 8), task (rank 4) on the merged model."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "dtrain.train", "tiny", *QUICK, f"output.folder={folder}"]
    subprocess.run(command, check=True, timeout=240, env=environment, capture_output=True)
    (folder / "recipe.yaml").write_text(
        dump(load_recipe("tiny", [*QUICK, f"output.folder={folder}"]))
    )
    return folder
