"""`dtrain sweep --dry-run`: the plan of the whole sweep, without running anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrain.cli import main
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.sweep import local_runs
from dtrain.sweep.local_runs import _slots

TOKENS = [
    f"stages.{stage}.train.{key}"
    for stage, tokens in (("domain", 10**9), ("task", 10**8))
    for key in ("epochs=null", f"tokens={tokens}")
]


def dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> str:
    command = ["dtrain", "sweep", "7b-lora", "--dry-run", "--price", "2", *words, *TOKENS]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    captured = capsys.readouterr()
    return captured.out


def figure(text: str, label: str) -> float:
    match = re.search(rf"^  {label} +(?:at most )?([\d.,]+)", text, re.MULTILINE)
    assert match, text
    return float(match[1].replace(",", ""))


def test_dry_run_counts_shared_stages_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rate = ["--sample", "stages.task.train.learning_rate=log(1e-5,1e-3)"]
    few = dry_run(monkeypatch, capsys, *rate, "--trials", "1")
    more = dry_run(
        monkeypatch,
        capsys,
        *rate,
        "--trials",
        "5",
        "--prune",
        "median",
        "stages.task.train.evaluate_every_steps=10",
    )
    both = dry_run(
        monkeypatch,
        capsys,
        *rate,
        "--sample",
        "stages.domain.train.learning_rate=log(1e-5,1e-3)",
        "--trials",
        "5",
    )
    first, fifth, whole = (figure(text, "GPU-hours") for text in (few, more, both))
    # The domain stage has ten times the tokens of the task stage.
    assert fifth < 1.6 * first and whole == pytest.approx(5 * first, rel=0.05)
    assert figure(more, "price") == pytest.approx(2 * fifth, rel=0.01)
    assert "at most" in more and "at most" not in few
    assert "domain: trained once" in more and "trained once" not in both
    assert not [*tmp_path.iterdir()]


def test_runs_at_once_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"uuid": f"GPU-{i}"} for i in range(5)]
    monkeypatch.setattr(local_runs, "gpus", lambda: rows)
    recipe = load_recipe("tiny", ["launch.processes=2"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in _slots(recipe, 2)] == [
        "GPU-0,GPU-1",
        "GPU-2,GPU-3",
    ]
    with pytest.raises(UserError, match=r"3 runs at once need 6 GPUs; there are 5"):
        _slots(recipe, 3)
    on_cpu = load_recipe("tiny", ["device=cpu"])
    assert all("CUDA_VISIBLE_DEVICES" not in slot for slot in _slots(on_cpu, 2))
