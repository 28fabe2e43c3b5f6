"""Preference stages give the same losses and metrics under every engine, rank count and batch.

The golden files contain loss, gradient norm and metrics of every step. To write them again after a
change that is meant to change them: `DTRAIN_WRITE_GOLDEN=1 pytest tests/distributed/
test_preference.py -k ddp-1-1`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.preference_rows import preference_rows

PAIRS, PACKED_SEQUENCES = 24, 11
FULL = {"kind": "full"}
THIRD_SAVE = "task/checkpoints/step-000003"
Start = Callable[..., Any]


@pytest.fixture
def start_pairs(start_stage, write_rows) -> Start:
    """start_pairs(kind, overrides of the stage, …) → ranks of a run of one preference stage."""

    def start(
        kind: str,
        *overrides: str,
        micro: int = 1,
        dropout: float = 0.0,
        method: dict[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        rows = preference_rows(kind, PAIRS)
        sources = [{"path": write_rows(f"{kind}.jsonl", rows)}]
        stage = {
            "kind": kind,
            "method": method or {"kind": "lora", "r": 4, "alpha": 8, "dropout": dropout},
            "data": {"sequence_length": 256, "sources": sources},
        }
        return start_stage(stage, sources, f"train.micro_batch_size={micro}", *overrides, **more)

    return start


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[float]]]:
    """The figures of one rank with a micro-batch of one, by kind."""
    return {}


@pytest.mark.parametrize(
    ("kind", "engine", "ranks", "micro"),
    [
        ("dpo", "ddp", 1, 1),
        ("dpo", "ddp", 2, 1),
        ("dpo", "ddp", 1, 2),
        ("dpo", "fsdp2", 2, 2),
        ("dpo", "zero2", 2, 1),
        ("dpo", "zero3", 2, 2),
        ("kto", "ddp", 1, 1),
        ("kto", "ddp", 2, 2),
        ("kto", "zero3", 2, 1),
    ],
)
def test_engines_ranks_and_micro_batches(start_pairs, alone, kind, engine, ranks, micro) -> None:
    run = start_pairs(kind, ranks=ranks, micro=micro, options=[f"engine.kind={engine}"]).wait(0)
    found = run.figures()
    assert found[-1][0] < 0.6 * found[0][0], "nothing was learned: this would show nothing"
    run.assert_golden_figures(kind)
    run.assert_figures(alone.setdefault(kind, found))


def test_packed_and_unpacked_are_the_same(start_pairs) -> None:
    whole_set = "train.global_batch_size={}", "train.steps=3"
    alone = {"ranks": 1, "options": ["launch.processes=1"]}
    batch = [text.format(PACKED_SEQUENCES) for text in whole_set]
    packed = start_pairs("dpo", *batch, **alone).wait(0)
    batch = ["data.packing=false", *(text.format(PAIRS) for text in whole_set)]
    unpacked = start_pairs("dpo", *batch, folder="unpacked", **alone).wait(0)
    tokens = {record["tokens"] for r in (packed, unpacked) for record in r.records("task")}
    assert len(tokens) == 1  # every step is an epoch
    unpacked.assert_figures(packed.figures())


def test_killed_in_a_dpo_stage_it_ends_at_the_same_weights(start_pairs, weights) -> None:
    settings = {"dropout": 0.1, "ranks": 1}
    undisturbed = start_pairs("dpo", folder="undisturbed", **settings).wait(0)
    killed = start_pairs("dpo", "train.checkpoint_every_steps=1", dies_at=THIRD_SAVE, **settings)
    killed.wait(-signal.SIGKILL)
    run = start_pairs("dpo", "train.checkpoint_every_steps=1", **settings).wait(0)
    assert "resuming from step" in run.output
    assert run.figures() == undisturbed.figures()
    assert weights(run.folder) == weights(undisturbed.folder)


@pytest.fixture
def no_values(cache: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """no_values(name) → options of a start with a cache of its own, in which no value is stored."""

    def options(name: str = "cache") -> dict[str, Any]:
        (tmp_path / name).mkdir()
        (cache / "samples").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "samples").symlink_to(cache / "samples")
        return {"env": {"DTRAIN_CACHE": str(tmp_path / name)}}

    return options


def value_files(options: dict[str, Any]) -> set[Path]:
    return set(Path(options["env"]["DTRAIN_CACHE"]).glob("objectives/reference/*/*.safetensors"))


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_stored_reference_is_that_of_each_step(start_pairs, no_values, kind) -> None:
    options = no_values() | {"ranks": 1}
    if kind == "kto":
        options |= {"ranks": 2, "options": ["engine.kind=zero3"]}
    run = start_pairs(kind, "preference.precompute_reference=true", **options).wait(0)
    assert value_files(options)
    run.assert_golden_figures(kind)


@pytest.mark.parametrize(
    ("engine", "ranks"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)]
)
def test_full_training_keeps_its_reference(start_pairs, no_values, alone, engine, ranks) -> None:
    options = {"options": [f"engine.kind={engine}"], "method": FULL, "ranks": ranks}
    run = start_pairs("dpo", "train.learning_rate=0.001", **options, **no_values()).wait(0)
    found = run.figures()
    # Against the weights of the moment instead of the reference, all rewards would stay 0.
    assert found[-1][0] < 0.6 * found[0][0] and abs(found[-1][1]) > 0.1
    run.assert_figures(alone.setdefault("full", found))


def test_killed_while_the_reference_is_computed_and_in_full_training(
    start_pairs, no_values, weights
) -> None:
    rows = ["data.packing=false", "train.checkpoint_every_steps=1", "train.learning_rate=0.001"]
    more = {"method": FULL, "ranks": 1}
    caches = no_values("cache"), no_values("other")
    undisturbed = start_pairs("dpo", *rows, folder="undisturbed", **more, **caches[0]).wait(0)
    second_file = {"dies_at": "objectives/reference/", "dies_at_rename": 2}
    start_pairs("dpo", *rows, **second_file, **more, **caches[1]).wait(-signal.SIGKILL)
    first = value_files(caches[1])
    assert len(first) < len(value_files(caches[0]))  # those of the held-out rows are missing
    start_pairs("dpo", *rows, dies_at=THIRD_SAVE, **more, **caches[1]).wait(-signal.SIGKILL)
    assert first < value_files(caches[1])
    for file in value_files(caches[1]):  # the weights are no longer the reference's
        file.unlink()
    run = start_pairs("dpo", *rows, **more, **caches[1]).wait(0)
    assert "resuming from step" in run.output and "computing values of" in run.output
    assert run.figures() == undisturbed.figures()
    assert weights(run.folder) == weights(undisturbed.folder)
