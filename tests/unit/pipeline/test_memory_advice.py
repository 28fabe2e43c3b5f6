"""Exhausted memory is reported once with the planned memory, and the job is not retried."""

from __future__ import annotations

import json

import pytest
import torch

from dtrain import rank_main, train
from dtrain.config.load import load_recipe
from dtrain.core.errors import Exit
from dtrain.launching.requeue_policy import PERMANENT_FAILURES
from dtrain.pipeline.memory_advice import out_of_memory_text


def allocator_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    return caught.value


def test_message_has_the_planned_memory_and_suggestions() -> None:
    recipe = load_recipe("7b-lora", ["stages.task.train.micro_batch_size=16"])
    text = out_of_memory_text(allocator_error(), recipe)
    assert text.startswith("out of memory: ") and "tried to allocate" in text
    assert "now: peak of this rank" in text
    assert "plan, stage task: weights 1" in text and "tensors at the peak" in text
    assert "train.micro_batch_size=" in text.rpartition("→")[2]


def test_unknown_base_gets_general_advice(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of-no-library"}')
    recipe = load_recipe("7b-lora", [f"model.base={tmp_path}"])
    text = out_of_memory_text(MemoryError("no more"), recipe)
    assert "plan" not in text and "gradient_checkpointing=true" in text


def test_error_without_a_message_is_reported_by_its_type() -> None:
    text = out_of_memory_text(MemoryError(), load_recipe("7b-lora", []))
    assert text.startswith("out of memory: MemoryError\n")


def test_a_cause_that_another_error_wraps_is_named() -> None:
    later = ValueError("the batch cannot be computed")
    later.__cause__ = MemoryError("no more")
    assert out_of_memory_text(later, load_recipe("7b-lora", [])).startswith(
        "out of memory: no more"
    )


def test_run_exits_with_the_out_of_memory_status(tmp_path, monkeypatch, capsys) -> None:
    error = allocator_error()

    def out_of_memory(*_: object) -> None:
        raise error

    monkeypatch.setattr(rank_main, "start_world", out_of_memory)
    run = tmp_path / "run"
    assert train.main(["tiny", f"output.folder={run}"]) == Exit.OUT_OF_MEMORY
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["status"] == Exit.OUT_OF_MEMORY and "→" in outcome["reason"]
    assert "error: out of memory" in capsys.readouterr().err
    assert Exit.OUT_OF_MEMORY in PERMANENT_FAILURES  # a job is not requeued for it
