"""The training loss of each source is the same under every engine and number of ranks."""

from __future__ import annotations

import shutil

import pytest

REPLAY = "{path: 'dtrain:tiny-text/domain-heldout.jsonl', format: text, ratio: 0.25}"
SHORT = [
    f"stages.domain.data.replay={REPLAY}",
    "stages.domain.train.steps=3",
    "stages.domain.train.checkpoint_every_steps=null",
    "stages.task.train.steps=1",
    "stages.task.train.evaluate_every_steps=null",
    "stages.task.train.evaluate_on=null",
    "stages.task.train.checkpoint_every_steps=null",
]


def test_losses_by_source_add_up(start_ranks):
    alone = start_ranks("engine.kind=ddp", *SHORT, ranks=1, folder="alone").wait(0)
    alone = alone.records("domain")
    new, old = alone[0]["sources"]
    for line in (line for line in alone if "loss" in line):
        both = line["sources"]
        assert (both[new]["sequences"], both[old]["sequences"]) == (3, 1)
        total = sum(source["loss"] * source["supervised_tokens"] for source in both.values())
        assert total / line["supervised_tokens"] == pytest.approx(line["loss"], rel=1e-6)
        assert abs(both[new]["loss"] - both[old]["loss"]) > 1e-4
    for engine, kernels in (("fsdp2", "off"), ("zero3", "auto")):
        settings = [f"engine.kind={engine}", f"model.kernels={kernels}", *SHORT]
        run = start_ranks(*settings, folder=engine, worker="dtrain.train").wait(0)
        for line, first in zip(run.records("domain"), alone, strict=True):
            for name, source in line.get("sources", {}).items():
                expected = first["sources"][name]
                assert source["loss"] == pytest.approx(expected["loss"], abs=2e-5)
                assert source["tokens"] == expected["tokens"]
        assert "training loss, first 10 %" in (run.folder / "report.html").read_text()
        shutil.rmtree(run.folder)
