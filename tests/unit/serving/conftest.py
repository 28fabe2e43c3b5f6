"""A real run of two LoRA stages, and folders that look like parts of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
PLAIN = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a process of its own."""
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


Make = Callable[..., Path]


@pytest.fixture
def make_adapter() -> Make:
    """Makes a LoRA adapter over layers of (out, in); its numbers follow from its folder's name."""
    return write_adapter


def write_adapter(
    folder: Path, layers: dict[str, tuple[int, int]], r: int, /, **config: object
) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    ranks = config.get("rank_pattern") or {}
    tensors = {}
    for name, (out, into) in layers.items():
        rank = ranks.get(name.rpartition(".")[2], r)  # type: ignore[attr-defined]
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in layers})
    content = PLAIN | {"r": r, "lora_alpha": 2 * r, "target_modules": targets} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def record_stage() -> Callable[..., None]:
    """Writes the record that a stage leaves beside its adapter."""

    def record(folder: Path, identity: str, parent: str, method: str) -> None:
        inputs = {"parent": parent, "method": {"kind": method}, "kind": "cpt"}
        content = {"identity": identity, "inputs": inputs}
        (folder / "stage.json").write_text(json.dumps(content))

    return record
