"""`output.use: best`: the best checkpoint is what is evaluated, merged and handed on."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file

from dtrain.checkpoints import Checkpoint
from dtrain.config.engines import ENGINES

BEST = [
    "output.use=best",
    "output.keep_checkpoints=1",
    "stages.domain.train.steps=6",
    "stages.domain.train.learning_rate=0.3",  # the longer, the worse for the questions
    "stages.domain.train.on_divergence=warn",
    "stages.domain.train.evaluate_every_steps=2",
    "stages.domain.train.checkpoint_every_steps=2",
    "stages.domain.train.evaluate_on=task",
    "stages.task.train.steps=2",
    "stages.task.train.evaluate_every_steps=1",
    "stages.task.train.checkpoint_every_steps=1",
]


def assert_is_best(run) -> None:
    """Its evaluation, adapter and terminal show the checkpoint with the lowest held-out loss."""
    domain = run.json("lineage.json")["artifacts"][0]
    measured = {r["step"]: r["held_out"]["task"] for r in run.records("domain") if "held_out" in r}
    step = min(measured, key=measured.__getitem__)
    assert domain["steps"] == 6 and domain["used"]["step"] == step < 6
    assert measured[step] == domain["used"]["value"] < domain["used"]["last_value"]
    losses = run.json("evaluation.json")["losses"]["task"]
    assert losses["domain"] == pytest.approx(measured[step], abs=2e-6)
    assert f"stage domain is step {step} of 6: loss of task" in run.output
    checkpoint = Checkpoint.open(run.folder / f"domain/checkpoints/step-{step:06d}")
    adapter = load_file(run.folder / "domain/adapter/adapter_model.safetensors")
    assert len(adapter) == len(checkpoint.names)
    for name, shape in checkpoint.names.items():
        saved = checkpoint.read(name, "weight", 0, shape[0] * shape[1]).view(shape)
        assert torch.equal(saved, adapter[name.replace(".default", "")])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_checkpoint_is_the_model(start_ranks, weights, engine) -> None:
    settings = [f"engine.kind={engine}", *BEST]
    run = start_ranks(*settings).wait(0)
    assert_is_best(run)
    if engine != "ddp":
        return
    killed = start_ranks(*settings, folder="killed")
    killed.until(lambda: "stage domain is step" in killed.log.read_text())
    killed.kill().wait(-signal.SIGKILL)
    resumed = start_ranks(*settings, folder="killed").wait(0)
    assert_is_best(resumed)
    assert weights(resumed.folder) == weights(run.folder)
    # The same run with the last checkpoints is another model, and says so.
    refused = start_ranks(*settings, "output.use=last").wait(2)
    assert "output.use: 'best' in the checkpoint, 'last' now" in refused.output
