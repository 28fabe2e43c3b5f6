"""Out of memory: recognised, told once with the plan's numbers, and never tried again."""

from __future__ import annotations

import json

import pytest
import torch

from dtrain import train, worker
from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit
from dtrain.launching.decide import HOPELESS
from dtrain.pipeline.out_of_memory import is_out_of_memory, out_of_memory_text


def allocator_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


def test_what_the_allocators_raise_is_recognised() -> None:
    assert is_out_of_memory(allocator_error())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_plans_numbers_and_what_would_help_are_told() -> None:
    recipe = load_recipe("7b-lora", ["stages.task.train.micro_batch_sequences=16"])
    text = out_of_memory_text(allocator_error(), recipe)
    assert text.startswith("out of memory: ") and "tried to allocate" in text
    assert "now: peak of this rank" in text
    assert "plan, stage task: weights 1" in text and "tensors at the peak" in text
    assert "train.micro_batch_sequences=" in text.rpartition("→")[2]


def test_a_base_that_the_plan_does_not_know_gets_general_advice(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    recipe = load_recipe("7b-lora", [f"model.base={tmp_path}"])
    text = out_of_memory_text(MemoryError("no more"), recipe)
    assert "plan" not in text and "gradient_checkpointing=true" in text


def test_an_error_without_words_is_told_by_its_name() -> None:
    text = out_of_memory_text(MemoryError(), load_recipe("7b-lora", []))
    assert text.startswith("out of memory: MemoryError\n")


def test_a_run_ends_with_its_own_status(tmp_path, monkeypatch, capsys) -> None:
    error = allocator_error()

    def out_of_memory(*_: object) -> None:
        raise error

    monkeypatch.setattr(worker, "start_world", out_of_memory)
    run = tmp_path / "run"
    assert train.main(["tiny", f"output.folder={run}"]) == Exit.OUT_OF_MEMORY
    told = json.loads((run / "outcome.json").read_text())
    assert told["status"] == Exit.OUT_OF_MEMORY and "→" in told["reason"]
    assert "error: out of memory" in capsys.readouterr().err
    assert Exit.OUT_OF_MEMORY in HOPELESS  # a job is not requeued for it
