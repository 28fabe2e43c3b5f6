"""What a run is doing, from its files: live, once, and as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain.cli.root import app
from dtrain.core.errors import UserError
from dtrain.monitoring.run_state import read_state
from dtrain.monitoring.watch import curve
from dtrain.monitoring.watch_app import WatchApp

RECIPE = """\
name: night
stages:
  - {name: domain, kind: cpt, data: {sequence_length: 64}, train: {global_batch_size: 4, epochs: 1}}
  - {name: task, kind: sft, data: {sequence_length: 64}, train: {global_batch_size: 4, steps: 50}}
"""


def line(step: int, **more: Any) -> str:
    record = {
        "step": step,
        "total_steps": 200,
        "loss": 3.0 - step / 100,
        "learning_rate": 2e-4,
        "grad_norm": 0.5,
        "tokens": 256,
        "tokens_per_second": 64.0,
        "peak_memory_bytes": 5_000_000_000,
        "seconds": {"data": 0.1, "compute": 3.9},
    }
    return json.dumps(record | more) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 50 of 200 of its first stage."""
    folder = tmp_path / "run"
    (folder / "domain").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    lines = [line(step) for step in range(1, 51)]
    lines.insert(40, json.dumps({"step": 40, "held_out": {"prose": 2.5, "odd": None}}) + "\n")
    (folder / "domain" / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_a_running_stage_has_its_figures_and_the_time_left(run: Path) -> None:
    state = read_state(run)
    assert (state.name, state.state) == ("night", "running")
    domain, task = state.stages
    assert (domain.step, domain.total_steps, domain.held_out) == (50, 200, {"prose": 2.5})
    assert domain.seconds_left == pytest.approx(150 * 4.0)
    # 50 steps of 4 sequences of 64 tokens at 64 tokens/s
    assert state.seconds_left == pytest.approx(150 * 4.0 + 50 * 4.0)
    assert task.state == "waiting" and task.step == 0
    recipe = (run / "recipe.yaml").read_text().replace("steps: 50", "epochs: 2")
    (run / "recipe.yaml").write_text(recipe)
    assert read_state(run).seconds_left is None


def test_outcomes_and_silence(run: Path) -> None:
    old = time.time() - 3600
    for path in run.rglob("*"):
        os.utime(path, (old, old))
    assert read_state(run).state == "silent"
    outcome = {"outcome": "failed", "status": 3, "reason": "the loss is NaN"}
    (run / "outcome.json").write_text(json.dumps(outcome))
    state = read_state(run)
    assert (state.state, state.reason, state.seconds_left) == ("failed", "the loss is NaN", None)


def test_once_and_json(run: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    now = time.time()  # "last change 0 s ago" twice, whatever the second start takes
    monkeypatch.setattr(time, "time", lambda: now)
    (run / "slurm").mkdir()
    (run / "slurm" / "job.log").write_text("first\nattempt 1 of job 7 on n1\x1b[31m\n")
    app(["watch", str(run)], standalone_mode=False)
    piped = capsys.readouterr().out  # no live view where nobody can quit it
    app(["watch", str(run), "--once"], standalone_mode=False)
    text = capsys.readouterr().out
    assert piped == text
    for part in ("night", "running", "50/200", "10 min 00 s", "2.500", "prose 2.500", "5 GB"):
        assert part in text, text
    assert "attempt 1 of job 7" in text and "\x1b[31m" not in text
    app(["watch", str(run), str(run), "--json"], standalone_mode=False)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["stages"][0]["step"] == 50 and first["folder"] == second["folder"]


def test_the_live_view_shows_new_steps(run: Path) -> None:
    async def look() -> tuple[str, str]:
        watch = WatchApp([run])
        async with watch.run_test(size=(150, 30)) as pilot:
            await pilot.pause()
            before = screen(watch)
            with open(run / "domain" / "metrics.jsonl", "a") as file:
                file.write(line(51))
            watch.refresh_runs()
            await pilot.pause()
            after = screen(watch)
            await pilot.press("q")
        return before, after

    def screen(watch: WatchApp) -> str:
        return watch.export_screenshot(simplify=True)

    before, after = asyncio.run(look())
    assert "50/200" in before and "51/200" in after


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for option in ("--once", "--json"):
        with pytest.raises(UserError, match="is not a run folder"):
            app(["watch", str(tmp_path), option], standalone_mode=False)
    with pytest.raises(UserError, match="is not a run folder"):
        WatchApp([tmp_path])


def test_a_curve_has_at_most_32_columns() -> None:
    assert curve([]) == "" and curve([1.0]) == "▁" and curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert len(curve([float(n) for n in range(1000)])) == 32
