"""An objective over pairs fits the seam: it is written here and trained by the shipped step.

It is DPO's skeleton: chosen and rejected answers of a pair in one sequence, log-probabilities of
the base with the adapter off, a baseline over the global batch, a loss per pair.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from dtrain.config.data import Data
from dtrain.config.load import load_recipe
from dtrain.config.methods import Lora
from dtrain.data.loader import Loader, MicroBatch
from dtrain.data.packed_dataset import BatchCounts
from dtrain.data.packing import Packing
from dtrain.data.prepare import DatasetSpec, prepare
from dtrain.data.tokenize import AnswerEncoder, Document
from dtrain.distributed.collective_timer import CollectiveTimer
from dtrain.methods.base import build_method
from dtrain.models.load import load_base
from dtrain.models.loss import target_logits, token_losses
from dtrain.models.routing import ExpertLoad
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.base import LossOutput, Objective, adapters_disabled
from dtrain.samples.make import ensure
from dtrain.training.callbacks import Callback
from dtrain.training.held_out import HeldOutSet, evaluate
from dtrain.training.train_step import train_step

LORA = Lora(kind="lora", r=4, dropout=0.0)
PAIRS, BATCH = 14, 12  # the pairs fill fewer sequences, so one rank of three has none


class PairEncoder(AnswerEncoder):
    """A text "question|chosen|rejected" as two documents with labels 1 and 0."""

    def documents(self, records, counts: Counter[str]) -> list[Document]:
        out = []
        for record in records:
            prompt, *answers = record.value.split("|")
            start = len(self.tokenizer(prompt).input_ids)
            for label, answer in zip((1, 0), answers, strict=True):
                ids = np.array(self.tokenizer(prompt + answer).input_ids, dtype=np.int32)
                runs = np.array([start, ids.size], dtype=np.int32)
                out.append(Document(ids, runs, record.file_index, record.row_number, label))
        return out


class Pairwise(Objective):
    """-log sigmoid of how much better the chosen answer got, against the step's mean."""

    # Under the name of an objective that accepts text rows: this one is not in the table.
    dataset = DatasetSpec("cpt", PairEncoder, Packing.WHOLE)
    metric_sum_names = ("right",)

    def weight(self, counts: BatchCounts) -> int:
        return counts.examples

    def begin_step(self, model, batches, world) -> float:
        margins = [self.margins(model, batch) for batch in batches]
        total, count = world.sum([float(torch.cat(margins).sum()), sum(map(len, margins))])
        return total / count

    @torch.no_grad()
    def margins(self, model, batch) -> torch.Tensor:
        with adapters_disabled(model):
            return self.differences(model, batch)

    def differences(self, model, batch: MicroBatch) -> torch.Tensor:
        losses = token_losses(target_logits(model, batch), batch.targets)
        ends = np.cumsum(batch.document_lengths)
        document = torch.from_numpy(ends.searchsorted(batch.target_positions.numpy(), side="right"))
        sums = torch.zeros(len(ends)).index_add(0, document, -losses[: len(batch.targets)])
        chosen = torch.from_numpy(batch.labels == 1)
        if batch.sequence_ids == [-1]:
            return sums[:0]
        assert (batch.document_ids[::2] + 1 == batch.document_ids[1::2]).all()
        return sums[chosen] - sums[~chosen]

    def loss(self, model, batch, statistics) -> LossOutput:
        gain = self.differences(model, batch) - self.margins(model, batch)
        losses = -logsigmoid(gain + 0.01 * statistics)
        right = (gain > 0).sum()
        return LossOutput(losses.sum(), len(losses), losses.detach(), {"right": right})

    def item_positions(self, batch) -> np.ndarray:
        starts = np.cumsum([0, *batch.document_lengths])[:-1]
        return starts[batch.labels == 1]

    def metrics(self, sums, weight) -> dict[str, float]:
        return {"accuracy": sums["right"] / weight}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ensure("tiny-llama"))


def prepare_pairs(folder: Path, tokenizer: Any, rows: list[list[str]], **settings: Any) -> Any:
    """Prepare sources of rows such as "Who?|fox|dog"."""
    sources = []
    for number, texts in enumerate(rows):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"path": str(path), "format": "text"})
    data = Data.model_validate({"sources": sources, "sequence_length": 96, **settings})
    return prepare(data, Pairwise.dataset, tokenizer, "t", folder / "cache")


@pytest.fixture
def dataset(tmp_path, tokenizer):
    """Two sources of pairs of many lengths."""
    rows = [f"Who{' ?' * n}|{'fox ' * (n % 5 + 1)}|{'dog ' * (n % 3 + 1)}" for n in range(PAIRS)]
    return prepare_pairs(tmp_path, tokenizer, [rows[::2], rows[1::2]])


def test_both_answers_of_a_pair_are_in_one_sequence(dataset) -> None:
    numbers = np.arange(dataset.sequences_per_epoch)
    assert 1 < len(numbers) < PAIRS  # pairs share sequences
    assert dataset.counts(numbers).examples == PAIRS
    seen = []
    for number in numbers:
        batch = dataset.read(np.array([number]))
        assert batch.labels.tolist() == [1, 0] * (len(batch.labels) // 2)
        assert (batch.documents[::2] + 1 == batch.documents[1::2]).all()
        seen += batch.documents.tolist()
        assert dataset.counts(np.array([number])).examples == len(batch.labels) // 2
    assert sorted(seen) == list(range(2 * PAIRS))


def test_an_unpacked_pair_has_a_sequence_of_its_own(tmp_path, tokenizer) -> None:
    rows = [f"Who?|{'fox ' * n}|dog" for n in (1, 2, 3)]
    dataset = prepare_pairs(tmp_path, tokenizer, [rows], packing=False)
    batches = [dataset.read(np.array([number])) for number in range(dataset.sequences_per_epoch)]
    assert [batch.documents.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]


class ThreadWorld:
    """Ranks that are threads of this process."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier

    def sum(self, values) -> list[float]:
        self.board[self.rank] = list(values)
        self.barrier.wait()
        totals = [sum(column) for column in zip(*self.board, strict=True)]
        self.barrier.wait()
        return totals


class OneStep:
    """An engine whose update is to keep this rank's gradient."""

    def __init__(self, world: Any, micro_batch: int) -> None:
        recipe = load_recipe("tiny")
        base = load_base(
            ensure("tiny-llama"),
            recipe.model,
            quantized=False,
            dtype=torch.float32,
            device=world.device,
        )
        self.module = self.model = build_method(LORA).attach(base, seed=0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:  # else the adapter changes nothing
                    parameter.fill_(0.02)
        self.world, self.autocast, self.result_weights = world, nullcontext, nullcontext
        self.collectives = CollectiveTimer()
        train = SimpleNamespace(micro_batch=micro_batch)
        self.stage, self.gradient = SimpleNamespace(train=train), None

    def before_forward(self, *, last: bool) -> None:
        return

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, rate: float) -> float:
        grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.gradient = torch.cat(grads)
        return float(self.gradient.norm())


def one_step(dataset: Any, ranks: int, micro_batch: int) -> tuple[Any, torch.Tensor, Any]:
    """A step over all pairs and an evaluation: result, gradient and what was measured."""
    board, barrier = [None] * ranks, threading.Barrier(ranks, timeout=60)
    total = dataset.sequences_per_epoch
    results: list[Any] = [None] * ranks
    # Built one after the other: transformers patches classes while it loads a model, and two
    # threads that load at once leave them patched.
    engines = [
        OneStep(ThreadWorld(rank, ranks, board, barrier), micro_batch) for rank in range(ranks)
    ]

    def work(rank: int) -> None:
        engine = engines[rank]
        loader = Loader(dataset, seed=0, global_batch=BATCH, total_sequences=total)
        objective = Pairwise(SimpleNamespace(kind="dpo"))  # type: ignore[arg-type]
        trainer = SimpleNamespace(
            engine=engine,
            objective=objective,
            loader=loader,
            seed=0,
            callbacks=Callback(),
            expert_load=ExpertLoad(torch.nn.Linear(1, 1)),
        )
        result = train_step(trainer, 0, 1e-3, wants_stop=False)
        held_out = evaluate(engine, HeldOutSet(objective, loader))
        results[rank] = result, engine.gradient, held_out

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gradient = torch.stack([gradient for _, gradient, _ in results]).mean(0)
    return results[0][0], gradient, results[0][2]


def test_ranks_and_micro_batches_change_no_pair_loss(dataset) -> None:
    result, gradient, measured = one_step(dataset, 1, BATCH)
    assert dataset.sequences_per_epoch <= BATCH * 2 // 3
    assert result.loss != pytest.approx(np.log(2), abs=1e-4) and gradient.norm() > 0
    assert 0 < result.metrics["accuracy"] <= 1
    by_source = [source["loss"] for source in result.sources.values()]
    assert np.mean(by_source) == pytest.approx(result.loss, rel=1e-6)  # 7 pairs in each
    assert measured.loss == pytest.approx(result.loss, rel=1e-6)
    assert measured.metrics == pytest.approx(result.metrics, rel=1e-6)
    assert sum(measured.block_losses) / sum(measured.block_items) == pytest.approx(result.loss)
    assert len(measured.block_items) == dataset.sequences_per_epoch
    for ranks, micro_batch in ((1, 1), (2, 1), (3, 2)):
        other, other_gradient, other_measured = one_step(dataset, ranks, micro_batch)
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
        assert other.metrics == pytest.approx(result.metrics)
        assert other_measured.loss == pytest.approx(measured.loss, rel=1e-5)
        assert other_measured.block_losses == pytest.approx(measured.block_losses, rel=1e-5)
        assert other_measured.block_items == measured.block_items
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-3, atol=1e-6)


def test_disabled_adapters_leave_the_base_and_the_flags() -> None:
    engine = OneStep(SimpleNamespace(device=torch.device("cpu")), 1)
    ids = torch.arange(20).view(1, -1)
    base = engine.model.get_base_model()
    trainable = {n for n, p in engine.model.named_parameters() if p.requires_grad}
    adapted = engine.model(input_ids=ids).logits
    with adapters_disabled(engine.model):
        plain = engine.model(input_ids=ids).logits
    assert not torch.equal(plain, adapted)
    assert torch.equal(engine.model(input_ids=ids).logits, adapted)
    assert trainable == {n for n, p in engine.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(engine.model(input_ids=ids).logits, plain)
