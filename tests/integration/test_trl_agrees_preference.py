"""TRL as oracle of preference objectives: its loss functions, and its trainers step by step."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from dtrain.config.load import load_recipe
from dtrain.config.preference import PreferenceSettings
from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import store_folder
from dtrain.data.loader import Loader
from dtrain.data.preference_encoders import CHOSEN
from dtrain.data.prepare import prepare
from dtrain.models.hub import base_folder
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.objectives.base import objective_class
from dtrain.objectives.preference import Pairs
from tests.preference_rows import preference_rows

ROOT = Path(__file__).parents[2]
STEPS, BATCH, MICRO = 5, 4, 2
LOSS_TOLERANCE = 1e-5
Answer = tuple[list[int], list[int]]  # tokens of its prompt, and its own
LENGTHS = [3, 7, 2, 5], [4, 1, 6, 2]  # tokens of chosen and of rejected answers
CPU = SimpleNamespace(
    device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values
)


@pytest.fixture
def log_probs() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each token [8, 7] of chosen then rejected answers, 0 where they end,
    whether it is a token, and the sums [8] by a reference."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([*LENGTHS[0], *LENGTHS[1]])
    mask = torch.arange(7) < counts.unsqueeze(1)
    tokens = -torch.rand(8, 7, generator=generator) * 3 * mask
    return tokens, mask, -torch.rand(8, generator=generator) * 8


def pairs(tokens: Tensor, mask: Tensor, reference: Tensor) -> Pairs:
    sums, counts = tokens.sum(1), mask.sum(1).float()
    return Pairs(*sums.chunk(2), *counts.chunk(2), *reference.chunk(2))


def mean_loss(kind: str, values: Pairs, **preference: Any) -> float:
    objective: Any = objective_class(kind)(
        SimpleNamespace(preference=PreferenceSettings(**preference))
    )
    return float(objective.pair_losses(values).mean())


@pytest.mark.parametrize(
    ("loss", "preference"),
    [
        ("sigmoid", {}),
        ("robust", {"label_smoothing": 0.1}),
        ("hinge", {}),
        ("ipo", {}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("sigmoid_norm", {"length_normalized": True, "beta": 2.0}),
    ],
)
def test_losses_of_dpo(log_probs, loss: str, preference: dict[str, Any]) -> None:
    tokens, mask, reference = log_probs
    chosen, rejected = reference.chunk(2)
    nothing = torch.zeros_like(tokens)
    outputs = SimpleNamespace(log_probs=tokens, entropy=nothing, mean_logits=nothing, is_top1=mask)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=CPU,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=preference.get("beta", 0.1),
        label_smoothing=preference.get("label_smoothing", 0.0),
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    prompt = torch.zeros(8, 1, dtype=torch.bool)
    inputs = {
        "input_ids": torch.zeros(8, 8, dtype=torch.int64),
        "completion_mask": torch.cat([prompt, mask], 1).long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    expected = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    own = {} if loss == "sigmoid_norm" else {"loss": loss}
    found = mean_loss("dpo", pairs(*log_probs), **own, **preference)
    assert found == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["cpo", "simpo"])
def test_losses_of_cpo_and_simpo(log_probs, kind: str) -> None:
    values, beta = pairs(*log_probs), 0.3 if kind == "cpo" else 2.0
    per_token = kind == "simpo"
    chosen = values.chosen_mean if per_token else values.chosen
    rejected = values.rejected_mean if per_token else values.rejected
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=CPU,
        loss_type="simpo" if per_token else "sigmoid",
        simpo_gamma=0.7,
        beta=beta,
        label_smoothing=0.0,
    )
    expected = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()
    own = {"target_margin": 0.7} if per_token else {"sft_weight": 0.0}
    assert mean_loss(kind, values, beta=beta, **own) == pytest.approx(float(expected), rel=1e-6)
    if kind == "cpo":  # with cross-entropy, of weight 1
        with_sft = mean_loss(kind, values, beta=beta)
        assert with_sft == pytest.approx(float(expected - values.chosen_mean.mean()), rel=1e-6)


def test_losses_of_orpo(log_probs) -> None:
    values = pairs(*log_probs)
    trainer = SimpleNamespace(beta=0.2, accelerator=CPU)
    ratio = ORPOTrainer.odds_ratio_loss(trainer, values.chosen_mean, values.rejected_mean)[0]
    expected = float((-values.chosen_mean - ratio).mean())
    assert mean_loss("orpo", values, beta=0.2) == pytest.approx(expected, rel=1e-6)


STAGE = (
    "stages=[{name: task, kind: KIND, method: METHOD,"
    " data: {sequence_length: 256, packing: false, sources: [{path: PATH}]},"
    f" train: {{global_batch_size: {BATCH}, micro_batch_size: MICRO, steps: {STEPS},"
    " learning_rate: RATE, lr_scheduler: linear, warmup_ratio: 0.0, max_grad_norm: 1.0}}]"
)
LORA, FULL = "{kind: lora, r: 4, dropout: 0.0}", "{kind: full}"


@pytest.fixture
def run(tmp_path: Path, write_rows) -> Callable[..., tuple[Recipe, list[dict[str, Any]]]]:
    """run(kind, …) → recipe and steps of a finished run of one preference stage."""

    def start(
        kind: str, *, micro: int, method: str = LORA, rate: float = 0.003
    ) -> tuple[Recipe, list[dict[str, Any]]]:
        rows = preference_rows(kind, STEPS * BATCH)
        stage, values = STAGE, {"KIND": kind, "METHOD": method, "MICRO": micro, "RATE": rate}
        for name, value in {**values, "PATH": write_rows("rows.jsonl", rows)}.items():
            stage = stage.replace(name, str(value))
        command = [sys.executable, "-m", "dtrain.train", "tiny", stage]
        command += ["evaluation={}", "launch.processes=1"]
        folder = tmp_path / "run"
        subprocess.run([*command, f"output.folder={folder}"], cwd=ROOT, check=True, timeout=240)
        lines = (folder / "task" / "metrics.jsonl").read_text().splitlines()
        return load_recipe(str(folder / "recipe.yaml")), [json.loads(line) for line in lines]

    return start


class TokenizedPairsTrainer(DPOTrainer):
    """TRL's trainer of pairs that are tokenized already."""

    def _prepare_dataset(self, dataset, *settings):
        return dataset


class TokenizedRatingsTrainer(KTOTrainer):
    """TRL's trainer of rated answers that are tokenized already, each with an unrelated one."""

    def _prepare_dataset(self, dataset, *settings):
        return dataset


def rows_of_training(recipe: Recipe) -> Iterator[tuple[list[int], list[Answer]]]:
    """Labels and tokenized answers of each row of a run, in the order of its training."""
    stage, base = recipe.stages[0], base_folder(recipe.model.base)
    tokenizer = load_tokenizer(base)
    dataset = prepare(
        stage.data,
        objective_class(stage.kind).dataset,
        tokenizer,
        tokenizer_fingerprint(tokenizer),
        store_folder(),
    )
    loader = Loader(dataset, seed=recipe.seed, global_batch=BATCH, total_sequences=STEPS * BATCH)
    for step in range(STEPS):
        for batch in loader.micro_batches(step, 0, 1, 1):
            ids, starts = batch.input_ids[0].tolist(), (0, batch.document_lengths[0])
            answers = []
            for start, length in zip(starts, batch.document_lengths, strict=True):
                inside = (batch.target_positions >= start) & (
                    batch.target_positions < start + length
                )
                targets = batch.target_positions[inside] + 1
                assert len(targets) == targets[-1] - targets[0] + 1
                answers.append((ids[start : targets[0]], ids[targets[0] : targets[-1] + 1]))
            assert answers[0][0] == answers[1][0]
            yield batch.labels.tolist(), answers


def tokenized_pairs(recipe: Recipe) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for _, ((prompt, chosen), (_, rejected)) in rows_of_training(recipe)
        ]
    )


def tokenized_ratings(recipe: Recipe) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt_ids": prompt,
                "completion_ids": answer,
                "KL_completion_ids": unrelated,
                "label": label == CHOSEN,
            }
            for (label, _), ((prompt, answer), (_, unrelated)) in rows_of_training(recipe)
        ]
    )


def assert_same_losses(ours: list[dict[str, Any]], theirs: list[dict[str, float]]) -> None:
    print("\n".join(f"{a['loss']:.6f} {b['loss']:.6f}" for a, b in zip(ours, theirs, strict=True)))
    for own, other in zip(ours, theirs, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], abs=LOSS_TOLERANCE)


def test_steps_of_dpo_equal_those_of_trl(run, train_with_trl) -> None:
    recipe, ours = run("dpo", micro=2)
    theirs = train_with_trl(recipe, tokenized_pairs(recipe), TokenizedPairsTrainer, DPOConfig)
    assert_same_losses(ours, theirs)
    assert ours[-1]["loss"] < 0.5, "nothing was learned: the comparison would show nothing"


def test_steps_of_full_dpo_equal_those_of_trl(run, train_with_trl) -> None:
    """TRL computes its reference with a second model."""
    recipe, ours = run("dpo", micro=2, method=FULL, rate=1e-4)
    pairs = tokenized_pairs(recipe)
    theirs = train_with_trl(recipe, pairs, TokenizedPairsTrainer, DPOConfig)
    assert_same_losses(ours, theirs)
    assert ours[-1]["loss"] < 0.6, "nothing was learned: the comparison would show nothing"


def test_steps_of_kto_equal_those_of_trl(run, train_with_trl) -> None:
    """TRL's baseline is of a micro-batch, ours of the global batch: here they are the same."""
    recipe, ours = run("kto", micro=BATCH)
    theirs = train_with_trl(recipe, tokenized_ratings(recipe), TokenizedRatingsTrainer, KTOConfig)
    assert_same_losses(ours, theirs)
    baselines = [step["metrics"]["baseline"] for step in ours]
    assert baselines == pytest.approx([step["kl"] for step in theirs], abs=1e-4)
    assert max(baselines) > 0.1, "the model has not moved: the comparison would show nothing"
