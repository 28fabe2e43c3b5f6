"""Terms against forgetting give the same losses under every engine, rank count and micro-batch.

Every stage of one chain has another term, of adapters or of the base's own parameters; the adapters
of its first stage change what the Fisher information of the second one is estimated on.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOLERANCE = {"rel": 1e-5, "abs": 1e-6}
LORA = "{{kind: lora, r: 4, alpha: 8, dropout: {dropout}}}"
TERMS = {  # objective, method, term
    "change": ("sft", LORA, "{kind: l2_init, weight: 0.05}"),
    "fisher": ("sft", LORA, "{kind: ewc, weight: 2000.0, on: previous_stage, sequences: 5}"),
    "divergence": ("dpo", LORA, "{kind: kl_to_base, weight: 3.0}"),
    "last_layer": ("sft", "{{kind: full, trainable_layers: 1}}", "{kind: l2_init, weight: 1.0}"),
    "parameters": ("sft", "{{kind: full}}", "{kind: ewc, weight: 1000.0, sequences: 5}"),
}
QUESTIONS = "dtrain:tiny-text/task.json", "dtrain:tiny-text/task-heldout.json"
Start = Callable[..., Any]


def pairs(first: int, last: int) -> list[dict[str, str]]:
    return [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}. " * (n % 3 + 1), "rejected": "No idea."}
        for n in range(first, last)
    ]


def stage(name: str, files: tuple[str, str], micro: int, dropout: float) -> str:
    (kind, method, term), (rows, replay) = TERMS[name], files
    return (
        f"{{name: {name}, kind: {kind}, method: {method.format(dropout=dropout)},"
        f" data: {{sequence_length: 128, sources: [{{path: '{rows}'}}],"
        f" replay: {{path: '{replay}', ratio: 0.25}}}},"
        f" train: {{global_batch_size: 4, micro_batch_size: {micro}, steps: 4,"
        f" learning_rate: {0.001 if 'full' in method else 0.01}}}, regularize: {term}}}"
    )


@pytest.fixture
def start_chain(start_ranks, write_rows, cache: Path) -> Start:
    """start_chain(micro, dropout, …) → ranks of a run of all terms; nothing is in the cache."""

    def start(*overrides: str, micro: int = 1, dropout: float = 0.0, **more: Any) -> Any:
        shutil.rmtree(cache / "objectives", ignore_errors=True)
        preferences = (
            str(write_rows("pairs.jsonl", pairs(0, 24))),
            str(write_rows("replay.jsonl", pairs(24, 32))),
        )
        files = {"sft": QUESTIONS, "dpo": preferences}
        stages = [stage(name, files[kind], micro, dropout) for name, (kind, *_) in TERMS.items()]
        return start_ranks(f"stages=[{', '.join(stages)}]", "evaluation={}", *overrides, **more)

    return start


def figures(run: Any) -> list[list[float]]:
    return [
        [record["loss"], record["grad_norm"], record["metrics"]["regularization"]]
        for name in TERMS
        for record in run.records(name)
        if "loss" in record
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[float]]:
    """The figures of one rank with a micro-batch of one."""
    return []


@pytest.mark.parametrize(
    ("engine", "ranks", "micro", "checkpointing"),
    [
        ("ddp", 1, 1, False),
        ("ddp", 2, 2, True),
        ("fsdp2", 2, 1, True),
        ("zero2", 2, 2, False),
        ("zero3", 2, 1, False),
    ],
)
def test_engines_ranks_and_micro_batches(
    start_chain, alone, engine, ranks, micro, checkpointing
) -> None:
    options = [f"engine.kind={engine}"]
    options.append(f"model.gradient_checkpointing={json.dumps(checkpointing)}")
    found = figures(start_chain(micro=micro, ranks=ranks, options=options).wait(0))
    alone[:] = alone or found
    assert found == [pytest.approx(step, **TOLERANCE) for step in alone]
    for number, name in enumerate(TERMS):
        last = found[4 * number + 3]
        assert last[2] > 0.01 * last[0], f"{name} is too small to show anything"


def test_killed_in_a_penalized_stage_it_ends_at_the_same_weights(start_chain, weights) -> None:
    settings = {"dropout": 0.1, "ranks": 1}
    undisturbed = start_chain(folder="undisturbed", **settings).wait(0)
    every = [f"stages.{name}.train.checkpoint_every_steps=1" for name in TERMS]
    for stage in ("fisher", "parameters"):  # the information of adapters is estimated again
        third_save = f"{stage}/checkpoints/step-000003"
        start_chain(*every, dies_at=third_save, **settings).wait(-signal.SIGKILL)
    run = start_chain(*every, **settings).wait(0)
    assert "resuming from step" in run.output
    assert figures(run) == figures(undisturbed)
    assert weights(run.folder) == weights(undisturbed.folder)
