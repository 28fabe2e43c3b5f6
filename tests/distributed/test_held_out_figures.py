"""Perplexity, calibration and figures by source: the same on one rank and on two."""

from __future__ import annotations

import json
from math import exp

import pytest

SETS = {
    "mixed": {
        "kind": "cpt",
        "sequence_length": 64,
        "calibration": True,
        "sources": [
            {"path": "dtrain:tiny-text/domain-heldout.jsonl", "format": "text"},
            {"path": "dtrain:tiny-text/domain.jsonl", "format": "text"},
        ],
    },
}
SETTINGS = [
    f"evaluation={json.dumps({'sets': SETS})}",
    "stages.domain.train.steps=2",
    "stages.domain.train.evaluate_on=mixed",
    "stages.domain.train.evaluate_every_steps=1",
    "stages.task.train.steps=1",
    "stages.task.train.evaluate_on=null",
    "stages.task.train.evaluate_every_steps=null",
    "output.merge=false",
]


def figures(run) -> tuple[dict, dict, dict]:
    """Loss, metrics and figures by source of the base model."""
    content = run.json("evaluation.json")
    return tuple(content[key]["mixed"]["base"] for key in ("losses", "metrics", "sources"))


def test_figures_do_not_depend_on_the_ranks(start_ranks) -> None:
    two = start_ranks("engine.kind=fsdp2", *SETTINGS).wait(0)
    loss, metrics, sources = figures(two)
    assert 0 < metrics["ece"] < 1
    assert metrics["perplexity"] == pytest.approx(exp(loss))
    assert len(sources) == 2 and sum(s["items"] for s in sources.values()) > 100
    mean = sum(s["loss"] * s["items"] for s in sources.values())
    assert mean / sum(s["items"] for s in sources.values()) == pytest.approx(loss, rel=1e-6)
    for source, values in sources.items():
        assert values["perplexity"] == pytest.approx(exp(values["loss"]))
        assert f"mixed perplexity of {source}" in two.output
    logged = next(r for r in two.records("domain") if "held_out" in r)
    assert logged["held_out_sources"]["mixed"].keys() == sources.keys()
    one = start_ranks("engine.kind=ddp", *SETTINGS, ranks=1, folder="one").wait(0)
    other_loss, other_metrics, other_sources = figures(one)
    assert other_loss == pytest.approx(loss, abs=2e-5)
    assert other_metrics == pytest.approx(metrics, abs=2e-3)
    for source, values in sources.items():
        assert other_sources[source] == pytest.approx(values, rel=1e-5)
