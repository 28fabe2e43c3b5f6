"""A stage that forgets or diverges ends the chain before its merge; a later start finishes it."""

from __future__ import annotations

from dtrain.core.errors import Exit

SHORT = [
    "stages.domain.train.steps=6",
    "stages.domain.method={kind: full}",
    "stages.domain.train.learning_rate=1.0",  # far too high: the stage makes everything worse
    "stages.domain.train.evaluate_every_steps=null",
    "stages.domain.train.evaluate_on=null",
    "stages.task.train.steps=2",
    "stages.task.train.evaluate_every_steps=null",
    "stages.task.train.evaluate_on=null",
    "stages.task.train.checkpoint_every_steps=null",
]
ALLOWED = "stages.domain.train.on_divergence=warn"
FORGETS = "evaluation.gates={task: {max_increase: 0.02}}"


def test_a_stage_that_forgets_ends_the_chain(start_ranks):
    failed = start_ranks(FORGETS, ALLOWED, *SHORT).wait(Exit.GATE_FAILED)
    assert "evaluation.gates.task: stage domain changed the loss of task" in failed.output
    assert "Traceback" not in failed.output
    outcome = failed.json("outcome.json")
    assert outcome["status"] == Exit.GATE_FAILED and "gates.task" in outcome["reason"]
    assert not (failed.folder / "domain" / "merged").exists()
    assert not (failed.folder / "task").exists()
    steps = len(failed.records("domain"))
    gates = "evaluation.gates={task: {max_increase: 999}}"
    finished = start_ranks(gates, ALLOWED, *SHORT).wait(0)
    assert len(finished.records("domain")) == steps  # nothing was trained again
    assert (finished.folder / "task" / "merged" / "config.json").is_file()
    losses = finished.json("evaluation.json")["losses"]["task"]
    assert losses["domain"] > losses["base"] + 0.02
    # A complete run is held to gates that are stricter now.
    again = start_ranks(FORGETS, ALLOWED, *SHORT).wait(Exit.GATE_FAILED)
    assert "evaluation.gates.task" in again.output


def test_a_stage_that_diverges_ends_the_chain(start_ranks) -> None:
    failed = start_ranks(*SHORT, "stages.domain.train.checkpoint_every_steps=2").wait(Exit.DIVERGED)
    assert "the training loss is" in failed.output and "it diverged" in failed.output
    assert "lower train.learning_rate (1 now)" in failed.output
    assert "Traceback" not in failed.output
    assert failed.json("outcome.json")["status"] == Exit.DIVERGED
    assert not (failed.folder / "domain" / "merged").exists()
    steps = len(failed.records("domain"))
    assert 3 <= steps < 6
    finished = start_ranks(*SHORT, "stages.domain.train.checkpoint_every_steps=2", ALLOWED).wait(0)
    assert finished.output.count("the training loss is") == 1  # a warning, once
    assert (finished.folder / "task" / "merged" / "config.json").is_file()


def test_a_diverged_held_out_loss_ends_the_stage_before_its_merge(start_ranks) -> None:
    # Two steps are too few for a median of the training loss.
    steps = "stages.domain.train.steps=2"
    failed = start_ranks(*SHORT, steps).wait(Exit.DIVERGED)
    assert "the held-out loss of domain is" in failed.output
    assert not (failed.folder / "domain" / "merged").exists()
