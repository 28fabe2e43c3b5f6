"""`determinism: strict`: the same weights on any number of ranks, with dropout on."""

from __future__ import annotations

import pytest

SETTINGS = ["determinism=strict", "evaluation={sets: {}}"] + [
    f"stages.{stage}.{setting}"
    for stage in ("domain", "task")
    for setting in (
        "method.dropout=0.2",
        "train.steps=4",
        "train.evaluate_every_steps=null",
        "train.evaluate_on=null",
    )
]
STOP_AT_ONCE = {"DTRAIN_END_TIME": "1"}


@pytest.fixture(scope="module")
def known() -> dict[str, str]:
    """The hash of the first test's weights."""
    return {}


def same(known: dict[str, str], digest: str) -> bool:
    return known.setdefault("hash", digest) == digest


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_strict_weights_do_not_depend_on_the_number_of_ranks(
    start_ranks, weights, known, ranks
) -> None:
    run = start_ranks(*SETTINGS, ranks=ranks).wait(0)
    assert same(known, weights(run.folder))


def test_strict_weights_survive_a_change_of_ranks(start_ranks, weights, known) -> None:
    for ranks in (2, 1):
        start_ranks(*SETTINGS, ranks=ranks, env=STOP_AT_ONCE).wait(75)
    run = start_ranks(*SETTINGS, ranks=4).wait(0)
    assert "resuming from step 2" in run.output
    assert same(known, weights(run.folder))


def test_dropout_changes_the_weights(start_ranks, weights, known) -> None:
    """Without this, the tests above would prove nothing."""
    run = start_ranks(*SETTINGS, "seed=1", ranks=1).wait(0)
    assert not same(known, weights(run.folder))


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (["engine.kind=fsdp2"], 2, "only ddp can use determinism: strict, and this is fsdp2"),
        (
            [f"stages.{stage}.train.global_batch_size=6" for stage in (0, 1)],
            3,
            "determinism: strict needs a power of two of ranks, not 3",
        ),
    ],
)
def test_strict_is_rejected_where_it_is_not_supported(start_ranks, overrides, ranks, said) -> None:
    run = start_ranks(*SETTINGS, *overrides, ranks=ranks).wait(2)
    assert said in run.output and run.output.count("error:") == 1
    assert "Traceback" not in run.output
