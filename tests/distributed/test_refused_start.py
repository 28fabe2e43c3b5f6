"""A start that is refused, or fails before it trains, leaves the run in its folder as it was."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from dtrain.core.errors import Exit
from dtrain.core.run_dir import RunDir
from dtrain.monitoring.run_record import read_run
from dtrain.monitoring.run_state import read_state

# What a start writes whose end nobody needs: it may grow.
OF_A_START = {".lock", ".watch", "requested.yaml", "refused.json", "starts.jsonl"}


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run, except those of a start."""
    files = [p.relative_to(run) for p in run.rglob("*") if p.is_file()]
    return {str(p): (run / p).read_bytes() for p in files if p.parts[0] not in OF_A_START}


def stages(*names: str) -> str:
    """The stages of `tiny` under other names, or fewer of them."""
    train = {"global_batch_size": 4, "learning_rate": 0.01, "steps": 3}
    data = {"sequence_length": 64}
    texts = data | {"sources": [{"path": "dtrain:tiny-text/domain.jsonl", "format": "text"}]}
    rows = data | {"sources": [{"path": "dtrain:tiny-text/task.json", "format": "alpaca"}]}
    lora = {"kind": "lora", "r": 4}
    return "stages=" + json.dumps(
        [
            {"name": name, "kind": kind, "method": lora, "data": source, "train": train}
            for name, (kind, source) in zip(
                names, (("cpt", texts), ("sft", rows), ("sft", rows)), strict=False
            )
        ]
    )


@pytest.fixture
def finished(start_ranks):
    """A finished run of two stages, and a way to start it again."""

    def start(*overrides: str, names: tuple[str, ...] = ("domain", "task"), **more):
        quiet = ("evaluation={sets: {}}", "model.base=dtrain:tiny-llama", "engine.kind=ddp")
        return start_ranks(stages(*names), *quiet, *overrides, **more)

    start().wait(0)
    return start


def test_refused_starts_leave_a_finished_run_as_it_was(finished, tmp_path) -> None:
    run = tmp_path / "run"
    before = content(run)
    (tmp_path / "other.jsonl").write_text('{"text": "other words"}\n' * 40)
    (tmp_path / "broken.jsonl").write_text('{"text":\n')
    sources = "stages.{}.data.sources=[{{path: {}, format: {}}}]".format
    refused = [
        (["stages.domain.train.learning_rate=0.02"], "stage domain: the run differs"),
        (["stages.task.train.learning_rate=0.02"], f"--fresh output.reuse={run}"),
        (["seed=7"], "seed: 0 in the checkpoint, 7 now"),
        ([sources("domain", tmp_path / "other.jsonl", "text")], "data.content"),
        ([sources("task", tmp_path / "broken.jsonl", "alpaca")], "broken.jsonl:1: invalid JSON"),
        ([sources("task", tmp_path / "missing.jsonl", "alpaca")], "no such file"),
        (["model.base=nowhere/at-all"], "nowhere/at-all"),
        (["stages.task.train.global_batch_size=3"], "divided"),
    ]
    for number, (overrides, message) in enumerate(refused):
        start = finished(*overrides, ranks=1 if number else 2).wait(Exit.USER_ERROR)
        assert message in start.output and "Traceback" not in start.output
        assert start.output.count("error: ") == 1, start.output
        assert content(run) == before, overrides
    for names, message in (
        (("domain",), "the recipe does not have"),
        (("text", "task"), "the recipe does not have"),
    ):
        start = finished(names=names).wait(Exit.USER_ERROR)
        assert message in start.output and content(run) == before
    assert "the recipe does not have" in str(RunDir(run).read_exit_report()["reason"])
    assert read_state(run).state == "finished"
    assert [a.start.outcome for a in read_run(run).starts] == ["finished"]
    finished(names=("domain", "task", "more")).wait(0)  # what is not refused goes on
    assert [a["name"] for a in json.loads((run / "lineage.json").read_text())["artifacts"]] == [
        *("domain", "task", "more")
    ]
    assert not (run / "refused.json").exists() and not (run / "requested.yaml").exists()


def test_a_kill_before_the_acceptance_leaves_the_run_as_it_was(finished, tmp_path) -> None:
    before = content(tmp_path / "run")
    names = ("domain", "task", "more")
    finished(names=names, worker="killed_before_accept").wait(-signal.SIGKILL)
    assert content(tmp_path / "run") == before
    assert RunDir(tmp_path / "run").read_exit_report() == {}  # not the end of the start before
    finished(names=names).wait(0)
    assert read_state(tmp_path / "run").state == "finished"


@pytest.mark.parametrize(
    "mistake",
    ["method.target_modules=[no_such_layer]", "data.sources=[{path: missing.jsonl}]"],
)
def test_a_failed_first_start_binds_nothing(start_ranks, tmp_path, mistake) -> None:
    quiet = ("evaluation={sets: {}}", "engine.kind=ddp", stages("domain"))
    failed = start_ranks(*quiet, f"stages.domain.{mistake}").wait()
    assert read_state(tmp_path / "run").state == "failed", failed.output
    corrected = start_ranks(*quiet, "stages.domain.train.learning_rate=0.005").wait(0)
    assert "in the checkpoint" not in corrected.output
    assert "0.005" in (tmp_path / "run" / "recipe.yaml").read_text()
    ends = [(a["outcome"], bool(a["ended"])) for a in corrected.json("lineage.json")["attempts"]]
    assert ends[-1] == ("finished", True)


def test_a_run_whose_folder_is_moved_does_not_end_well(start_ranks, tmp_path) -> None:
    quiet = ("evaluation={sets: {}}", "engine.kind=ddp", stages("domain"))
    run = start_ranks(*quiet, "stages.domain.train.steps=5000")
    run.until(lambda: run.is_at("domain", 3))
    run.folder.rename(tmp_path / "elsewhere")
    run.wait(Exit.USER_ERROR)
    assert run.output.count("was moved or deleted") == 1 and "Traceback" not in run.output
    assert not run.folder.exists()
