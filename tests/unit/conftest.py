"""Small adapters and stage records for tests of merging and serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PLAIN = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False}
Make = Callable[..., Path]


@pytest.fixture
def make_adapter() -> Make:
    """Return a function that writes a LoRA adapter over layers of (out, in), seeded by its name."""
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
    """Return a function that writes the record of a stage next to its adapter."""

    def record(folder: Path, identity: str, parent: str, method: str) -> None:
        inputs = {"parent": parent, "method": {"kind": method}, "kind": "cpt"}
        content = {"identity": identity, "inputs": inputs}
        (folder / "stage.json").write_text(json.dumps(content))

    return record
