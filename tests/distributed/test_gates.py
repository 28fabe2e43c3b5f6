"""A stage that forgets ends the chain before its merge; the same command finishes it later."""

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
FORGETS = "evaluation.gates={task: {max_increase: 0.02}}"


def test_a_stage_that_forgets_ends_the_chain(start_ranks):
    failed = start_ranks(FORGETS, *SHORT).wait(Exit.GATE_FAILED)
    assert "evaluation.gates.task: stage domain changed the loss of task" in failed.output
    assert "Traceback" not in failed.output
    outcome = failed.json("outcome.json")
    assert outcome["status"] == Exit.GATE_FAILED and "gates.task" in outcome["reason"]
    assert not (failed.folder / "domain" / "merged").exists()
    assert not (failed.folder / "task").exists()
    steps = len(failed.records("domain"))
    finished = start_ranks("evaluation.gates={task: {max_increase: 999}}", *SHORT).wait(0)
    assert len(finished.records("domain")) == steps  # nothing was trained again
    assert (finished.folder / "task" / "merged" / "config.json").is_file()
    losses = finished.json("evaluation.json")["losses"]["task"]
    assert losses["domain"] > losses["base"] + 0.02
    # A complete run is held to gates that are stricter now.
    again = start_ranks(FORGETS, *SHORT).wait(Exit.GATE_FAILED)
    assert "evaluation.gates.task" in again.output
