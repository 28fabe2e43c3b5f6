"""Starts of the ranks: when each began and ended, and what it contributed."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from dtrain.core.run_dir import RunDir
from dtrain.monitoring.report import write_report
from dtrain.monitoring.run_record import read_run
from dtrain.monitoring.starts import Start, read_starts, record_start, timed_starts


def test_a_start_is_recorded_with_host_and_versions(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    record_start(run, nodes=1, ranks=2, device="cpu")
    (tmp_path / "domain").mkdir()
    metrics = tmp_path / "domain" / "metrics.jsonl"
    metrics.write_text("{}\n")
    record_start(run, nodes=2, ranks=16, device="NVIDIA H100")
    first, second = read_starts(run)
    assert first.previous_ended is None and first.gpus == 0 and second.gpus == 16
    assert second.previous_ended == pytest.approx(metrics.stat().st_mtime, abs=0.01)
    assert first.host and {"dtrain", "python", "torch"} <= first.versions.keys()


def test_a_machine_without_proc_records_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process() -> None:
        raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil, "Process", process)
    before = time.time()
    record_start(RunDir(tmp_path), nodes=1, ranks=1, device="cpu")
    assert before - 1 < read_starts(RunDir(tmp_path))[0].started < time.time() + 1


def test_starts_end_with_their_last_sign_of_life() -> None:
    def start(at: float, previous: float | None = None) -> Start:
        return Start(at, "node1", 1, 8, "NVIDIA H100", previous_ended=previous)

    # The second start was killed: the third dropped the lines of its lost steps.
    starts = [start(1000.0), start(5000.0, 2000.0), start(9000.0, 8000.0)]
    times = {"domain": [1500.0, 2000.0, 6000.0, 9500.0], "task": [9600.0]}
    metrics = {stage: [{"step": 1, "time": t} for t in ts] for stage, ts in times.items()}
    timed = timed_starts(starts, metrics)
    assert [start.seconds for start in timed] == [1000.0, 3000.0, 600.0]
    assert [start.steps for start in timed] == [
        {"domain": 2},
        {"domain": 1},
        {"domain": 1, "task": 1},
    ]
    assert timed_starts([], metrics) == []


@pytest.mark.parametrize(
    "line", ["{", "[]", "1", '{"started": 1}', '{"started": "x", "host": 1}', "\u2028"]
)
def test_lines_of_strangers_are_skipped(tmp_path: Path, line: str) -> None:
    run = RunDir(tmp_path)
    record_start(run, nodes=1, ranks=1, device="cpu")
    with open(run.starts, "a") as file:
        file.write(line + "\n")
    assert len(read_starts(run)) == 1


def test_the_report_has_gpu_hours_and_their_price(tmp_path: Path) -> None:
    start = {"started": 1e9, "host": "node7", "nodes": 1, "ranks": 8, "device": "NVIDIA H100"}
    (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "recipe.yaml").write_text("name: x\nstages: [{name: domain, kind: cpt}]\n")
    (tmp_path / "domain").mkdir()
    lines = [{"step": n, "loss": 2.0, "time": 1e9 + 900 * n} for n in range(1, 5)]
    (tmp_path / "domain" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_run(tmp_path).gpu_hours == pytest.approx(8.0)
    text = write_report(tmp_path, price=2.5).read_text()
    assert "8 x NVIDIA H100" in text and "8.00 GPU-hours" in text
    assert "20.00 at 2.5 per GPU-hour" in text and "node7" in text
