"""The Python example of the README, and what a notebook does next."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dtrain import Run

README = Path(__file__).parents[2] / "README.md"
SHORT = ["stages.domain.train.steps=2", "evaluation.generation={}", "launch.processes=1"]
SHORT += ["stages.domain.train.evaluate_every_steps=2", "stages.task.train.evaluate_every_steps=4"]


def example() -> str:
    """The block of code, on fewer steps."""
    section = README.read_text("utf-8").partition("## From Python")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    short = ", ".join(f'"{override}"' for override in SHORT)
    return code.group(1).replace('.steps=4"]', f'.steps=4", {short}]')


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example(), names)
    printed = capsys.readouterr().out
    assert "FITS" in printed and "stage task: 4 steps" in printed

    rows, result = names["rows"], names["result"]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert {row["stage"] for row in rows} == {"task"} and steps[-1]["loss"] < steps[0]["loss"]
    assert {row["stage"] for row in result.metrics()} == {"domain", "task"}
    models = [row["model"] for row in result.losses() if row["set"] == "task"]
    assert models == ["base", "domain", "task"]
    assert (result.model / "model.safetensors").exists()
    assert result.state.state == "finished"


SCRIPT = """
import signal, sys
from dtrain import load_recipe, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
try:
    run(load_recipe("tiny", sys.argv[1:]))
except KeyboardInterrupt:
    print("INTERRUPTED")
"""


def test_an_interrupt_saves_before_it_ends(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [*SHORT[1:], "stages.domain.train.steps=4000", "output.folder=run"]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *overrides],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    metrics = tmp_path / "run" / "domain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert "INTERRUPTED" in process.communicate(timeout=120)[0]
    finally:
        process.kill()  # the run dies with it
    saved = Run(tmp_path / "run")
    assert saved.state.state == "interrupted"
    done = saved.metrics("domain")[-1]["step"]
    [checkpoint] = (saved.folder / "domain" / "checkpoints").glob("step-*")
    assert 0 < done < 4000 and checkpoint.name == f"step-{done:06}"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
