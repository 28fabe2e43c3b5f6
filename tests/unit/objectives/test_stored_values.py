"""Values that are computed once per sequence: right, resumable, and never those of other inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from dtrain.config.data import Data
from dtrain.config.load import load_recipe
from dtrain.config.preference import PreferenceSettings
from dtrain.core.errors import UserError
from dtrain.data.loader import Loader, MicroBatch
from dtrain.data.prepare import prepare
from dtrain.distributed.world import World
from dtrain.models.load import load_base
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives import stored_values
from dtrain.objectives.base import StageContext
from dtrain.objectives.preference import Dpo
from dtrain.objectives.stored_values import StoredValues
from dtrain.samples.make import ensure

CPU = torch.device("cpu")
PAIRS = 14
INPUTS = {"base": "of this test"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=1))
    yield World(0, 1, 0, 1, CPU, group)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Pairs of many lengths, several in each sequence."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "prompt": "Who" + " ?" * n,
            "chosen": "fox " * (n % 5 + 1),
            "rejected": "dog " * (n % 3 + 1),
        }
        for n in range(PAIRS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / "pairs.jsonl"), "format": "preference"}
    data = Data.model_validate({"sources": [source], "sequence_length": 96})
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    dataset = prepare(data, Dpo.dataset, tokenizer, "t", folder / "cache")
    sequences = dataset.sequences_per_epoch
    assert sequences > 3
    return Loader(dataset, seed=0, global_batch=2, total_sequences=sequences)


def whole_set(loader: Loader) -> MicroBatch:
    return loader.read(np.arange(loader.total_sequences))


def lengths(batch: MicroBatch) -> dict[str, Tensor]:
    """A value that is known: the tokens of each document."""
    return {"tokens": torch.tensor(batch.document_lengths)}


@pytest.fixture
def build(tmp_path: Path, loader: Loader, world: World) -> Callable[..., StoredValues]:
    def make(inputs: dict[str, Any] = INPUTS, per: Any = "document") -> StoredValues:
        return StoredValues(tmp_path, inputs, loader, world, per=per)

    return make


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_reference_is_that_of_transformers(tmp_path, loader, world, micro_batch) -> None:
    base = ensure("tiny-llama")
    options = load_recipe("tiny").model
    model = load_base(base, options, quantized=False, dtype=torch.float32, device=CPU)
    settings: Any = SimpleNamespace(preference=PreferenceSettings())
    objective = Dpo(settings)
    objective.begin_stage(
        StageContext(base, tmp_path, tmp_path, INPUTS, False, loader, world, load_base)
    )
    assert objective.stored is not None
    blocks = objective.stored.compute(lambda b: objective.start_values(model, b), micro_batch)
    assert sum(blocks) == loader.total_sequences
    batch = whole_set(loader)
    found = objective.reference(model, batch)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected, start = [], 0
    for length in batch.document_lengths:
        ids = batch.input_ids[:, start : start + length]
        with torch.no_grad():
            log_probs = plain(input_ids=ids).logits[0].log_softmax(-1)
        inside = (batch.target_positions >= start) & (batch.target_positions < start + length)
        positions, targets = batch.target_positions[inside] - start, batch.targets[inside]
        expected.append(log_probs[positions, targets].sum())
        start += length
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-6)
    with_forward = Dpo(settings)
    torch.testing.assert_close(found, with_forward.reference(model, batch), atol=1e-5, rtol=1e-6)


def test_an_interrupted_computation_continues(build, loader, monkeypatch) -> None:
    monkeypatch.setattr(stored_values, "BLOCK_BATCHES", 1)
    blocks = build().compute(lengths, 1)
    assert next(blocks) == next(blocks) == 1
    blocks.close()
    seen: list[int] = []

    def counted(batch: MicroBatch) -> dict[str, Tensor]:
        seen.extend(batch.sequence_ids)
        return lengths(batch)

    again = build()
    assert again.missing().tolist() == list(range(2, loader.total_sequences))
    list(again.compute(counted, 1))
    assert seen == list(range(2, loader.total_sequences))
    batch = whole_set(loader)
    assert again.read(batch)["tokens"].tolist() == batch.document_lengths
    assert not len(build().missing())


def test_rows_of_targets_and_of_no_sequence(build, loader) -> None:
    stored = build(per="target")
    list(stored.compute(lambda b: {"pair": torch.stack([b.targets, b.targets + 1], 1)}, 2))
    batch = loader.read(np.array([3, 0, 2]))
    assert stored.read(batch)["pair"][:, 0].equal(batch.targets)
    nothing = loader.read(np.empty(0, dtype=np.int64))
    assert stored.read(nothing)["pair"].shape == (0, 2)
    documents = build()
    list(documents.compute(lengths, 2))
    assert documents.read(nothing)["tokens"].tolist() == [0]


def test_only_undamaged_values_of_the_same_inputs_are_used(build, loader, capsys) -> None:
    stored, everything = build(), list(range(loader.total_sequences))
    list(stored.compute(lengths, 2))
    other = build({"base": "another"})
    assert other.missing().tolist() == everything
    (file,) = stored.folder.glob("*.safetensors")
    (other.folder / file.name).parent.mkdir()
    (other.folder / file.name).write_bytes(file.read_bytes())  # put there by hand
    assert build({"base": "another"}).missing().tolist() == everything
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    again = build()
    assert "is not what was written" in capsys.readouterr().out
    assert again.missing().tolist() == everything
    list(again.compute(lengths, 2))
    assert again.read(whole_set(loader))["tokens"].tolist() == whole_set(loader).document_lengths


def test_values_must_be_finite(build) -> None:
    with pytest.raises(UserError, match="tokens that are not finite"):
        list(build().compute(lambda b: {"tokens": torch.full((len(b.labels),), torch.nan)}, 1))
