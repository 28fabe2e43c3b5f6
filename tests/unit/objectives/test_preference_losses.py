"""Losses of pairs and of rated answers, by hand; TRL's own code is compared in integration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.config.preference import PreferenceSettings
from dtrain.core.errors import UserError
from dtrain.data.loader import MicroBatch
from dtrain.data.preference_encoders import CHOSEN, REJECTED, UNRELATED
from dtrain.objectives.answers import documents_labeled, select_documents
from dtrain.objectives.base import objective_class
from dtrain.objectives.preference import Pairs, log_complement


def settings(**preference: Any) -> Any:
    return SimpleNamespace(preference=PreferenceSettings(**preference))


def build(kind: str, **preference: Any) -> Any:
    return objective_class(kind)(settings(**preference))


def pairs() -> Pairs:
    """Two pairs; chosen answers of 2 and 4 tokens, rejected ones of 5 and 1."""
    values = ([-4.0, -6.0], [-5.0, -3.0], [2, 4], [5, 1], [-4.5, -5.0], [-4.0, -3.5])
    return Pairs(*(torch.tensor(v, dtype=torch.float32) for v in values))


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


# log-ratios: chosen 0.5, -1.0; rejected -1.0, 0.5
@pytest.mark.parametrize(
    ("kind", "preference", "expected"),
    [
        ("dpo", {}, [-np.log(sigmoid(0.15)), -np.log(sigmoid(-0.15))]),
        ("dpo", {"beta": 0.5}, [-np.log(sigmoid(0.75)), -np.log(sigmoid(-0.75))]),
        (
            "dpo",
            {"label_smoothing": 0.2},
            [
                -0.8 * np.log(sigmoid(0.15)) - 0.2 * np.log(sigmoid(-0.15)),
                -0.8 * np.log(sigmoid(-0.15)) - 0.2 * np.log(sigmoid(0.15)),
            ],
        ),
        (
            "dpo",
            {"length_normalized": True},
            [-np.log(sigmoid(0.1 * (0.25 + 0.2))), -np.log(sigmoid(0.1 * (-0.25 - 0.5)))],
        ),
        (
            "dpo",
            {"sft_weight": 2.0},
            [-np.log(sigmoid(0.15)) + 2 * 2.0, -np.log(sigmoid(-0.15)) + 2 * 1.5],
        ),
        ("dpo", {"loss": "hinge"}, [0.85, 1.15]),
        ("dpo", {"loss": "ipo"}, [(0.45 - 5) ** 2, (-0.75 - 5) ** 2]),
        (
            "simpo",
            {},
            [-np.log(sigmoid(2 * (-2 + 1) - 0.5)), -np.log(sigmoid(2 * (-1.5 + 3) - 0.5))],
        ),
        ("cpo", {}, [-np.log(sigmoid(0.1)) + 2.0, -np.log(sigmoid(-0.3)) + 1.5]),
        ("cpo", {"sft_weight": 0.0}, [-np.log(sigmoid(0.1)), -np.log(sigmoid(-0.3))]),
    ],
)
def test_losses_of_pairs(kind: str, preference: dict[str, Any], expected: list[float]) -> None:
    losses = build(kind, **preference).pair_losses(pairs())
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_odds_are_finite_where_an_answer_is_certain() -> None:
    log_probs = torch.tensor([-1e-30, 0.0, -1e-4, -2.0, -90.0], requires_grad=True)
    found = log_complement(log_probs)
    expected = [np.log1p(-np.exp(x)) for x in (-1e-7, -1e-7, -1e-4, -2.0, -90.0)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    found.sum().backward()
    assert torch.isfinite(log_probs.grad).all()  # type: ignore[arg-type]


def test_rewards_and_accuracy() -> None:
    objective = build("dpo")
    sums = {name: float(value) for name, value in objective._metric_sums(pairs()).items()}
    metrics = objective.metrics(sums, 2)
    assert metrics == pytest.approx(
        {
            "rewards_chosen": -0.025,
            "rewards_rejected": -0.025,
            "reward_margin": 0.0,
            "accuracy": 0.5,
            "likelier": 0.5,
            "log_probs_chosen": -5.0,
            "log_probs_rejected": -4.0,
        },
        abs=1e-6,
    )


def micro_batch(lengths: list[int], labels: list[int], targets: list[list[int]]) -> MicroBatch:
    """Documents of these lengths, whose tokens are numbered, with targets at these positions."""
    starts = np.cumsum([0, *lengths])[:-1]
    positions = torch.tensor([s + t for s, ts in zip(starts, targets, strict=True) for t in ts])
    ids = torch.arange(sum(lengths)).view(1, -1)
    restarting = torch.cat([torch.arange(length) for length in lengths]).view(1, -1)
    return MicroBatch(
        ids,
        restarting,
        positions,
        ids[0, positions + 1],
        lengths,
        [0],
        [sum(lengths)],
        [0],
        np.arange(len(lengths)),
        np.array(labels),
    )


def test_a_selection_holds_whole_documents() -> None:
    labels = [CHOSEN, UNRELATED, REJECTED, UNRELATED]
    batch = micro_batch([4, 3, 5, 2], labels, [[1, 2], [1], [0, 3], [0]])
    part = select_documents(batch, documents_labeled(batch, UNRELATED))
    assert part.input_ids.tolist() == [[4, 5, 6, 12, 13]]
    assert part.position_ids is not None and part.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert part.target_positions.tolist() == [1, 3] and part.targets.tolist() == [6, 13]
    assert part.document_lengths == [3, 2] and part.document_ids.tolist() == [1, 3]
    assert part.labels.tolist() == [UNRELATED, UNRELATED]


def test_losses_of_rated_answers() -> None:
    objective = build("kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    labels = [CHOSEN, UNRELATED, REJECTED]
    batch = micro_batch([2, 2, 2], labels, [[0], [0], [0]])
    rewards = torch.tensor([0.4, 9.0, -0.2])
    losses: Tensor = objective.answer_losses(rewards, 0.6, batch)
    expected = [2 * (1 - sigmoid(0.4 - 0.3)), 0.0, 3 * (1 - sigmoid(0.3 + 0.2))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert objective.item_positions(batch).tolist() == [0, 4]


@pytest.mark.parametrize("counts", [[{"desirable": 3}, {"desirable": 4}], [{"undesirable": 7}]])
def test_kto_refuses_answers_of_one_label(counts) -> None:
    sources = [SimpleNamespace(store=SimpleNamespace(manifest={"counts": c})) for c in counts]
    dataset: Any = SimpleNamespace(sources=sources, names=["a.jsonl"])
    with pytest.raises(UserError, match=r"all 7 answers are labeled (true|false)"):
        build("kto").check_data(dataset)
    sources[0].store.manifest["counts"] = {"desirable": 1, "undesirable": 6}
    build("kto").check_data(dataset)
