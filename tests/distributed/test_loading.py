"""What a base's files hold is what every engine computes with, and no rank keeps more of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("load_worker.py")
SHORT = [
    "evaluation.sets={}",
    *(f"stages.{stage}.train.steps=2" for stage in ("domain", "task")),
    *(f"stages.{stage}.train.evaluate_every_steps=0" for stage in ("domain", "task")),
    *(f"stages.{stage}.train.evaluate_on=null" for stage in ("domain", "task")),
    *(f"stages.{stage}.train.learning_rate=1e-3" for stage in ("domain", "task")),
]


@pytest.mark.parametrize(
    "engine, method",
    [("ddp", "lora"), ("zero2", "lora"), ("fsdp2", "lora"), ("fsdp2", "qlora"), ("fsdp2", "full"),
     ("zero3", "lora"), ("zero3", "full")],
)  # fmt: skip
def test_no_rank_keeps_an_unsharded_parameter(start: Callable, engine: str, method: str) -> None:
    """FSDP2 frees an original when nothing refers to it: one list would hold a whole 70B base."""
    lines = start(2, [str(WORKER), engine, method]).splitlines()
    facts = json.loads(next(li for li in lines if li.startswith("FACTS ")).split(" ", 1)[1])
    assert facts["filled"] >= 21 and facts["kept"] == []


@pytest.fixture
def base(cache: Path, tmp_path: Path, save_small: Callable, start_ranks: Callable) -> Callable:
    """A small base of any type, with the tokenizer of `tiny`."""

    def make(kind: str, **changes: object) -> Path:
        folder = tmp_path / f"base-{kind}"
        save_small(kind, folder, **changes)
        if not (cache / "samples" / "tiny-llama").is_dir():
            start_ranks(*SHORT, ranks=1, folder="samples").wait(0)
        for path in (cache / "samples" / "tiny-llama").glob("*"):
            if "token" in path.name or path.suffix == ".jinja":
                shutil.copy(path, folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ["gemma4_text", "apertus"])
def test_engines_agree_on_a_model_with_stored_buffers(
    start_ranks: Callable, base: Callable, kind: str
) -> None:
    losses: dict[str, list[float]] = {}
    folder = base(kind)
    for engine in ("ddp", "fsdp2", "zero2", "zero3"):
        run = start_ranks(*SHORT, f"model.base={folder}", f"engine.kind={engine}", folder=engine)
        run.wait(0)
        losses[engine] = [float(line.split()[2]) for line in run.losses()]
        artefact = run.json("lineage.json")["artefacts"][0]
        assert artefact["load_peak_memory_bytes"] > 0
    assert len(losses["ddp"]) == 4
    for engine, found in losses.items():
        assert found == pytest.approx(losses["ddp"], abs=1e-5), engine
