"""metrics.jsonl after crashes, and values that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dtrain.monitoring.metrics import Metrics, is_number, read_metrics


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "task" / "metrics.jsonl"
    metrics = Metrics(path, resume_at=0)
    for step in range(1, 6):
        metrics.write({"step": step, "loss": 1.0 * step})
        metrics.write({"step": step, "held_out": {"domain": 0.5}})
    again = Metrics(path, resume_at=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 1, 2, 2, 3, 3]
    again.write({"step": 4, "loss": 9.0})
    assert read_metrics(path)[-1] == {"step": 4, "loss": 9.0}


def test_an_incomplete_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    Metrics(path, resume_at=2).write({"step": 2, "loss": 1.5})
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'


def test_nonfinite_values_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {
        "step": 1,
        "loss": math.nan,
        "grad_norm": math.inf,
        "held_out": {"a": -math.inf},
        "list": [math.nan, 1.0],
        "epoch": 0.5,
    }
    Metrics(path, resume_at=0).write(record)
    assert json.loads(path.read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "held_out": {"a": None},
        "list": [None, 1.0],
        "epoch": 0.5,
    }


def test_each_line_is_written_immediately(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", resume_at=0)
    metrics.write({"step": 1, "loss": 1.0})
    assert len(read_metrics(metrics.path)) == 1  # while the file is still open
    metrics.close()


def test_a_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_invalid_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n"x"\n{"loss": 1}\n{"step": "1"}\n\n{"step": 3}\n')
    assert read_metrics(path) == [{"step": 3}]


def test_a_number_is_what_a_float_can_be() -> None:
    others = [math.nan, -math.inf, 10**400, True, "1", None, [1]]
    assert [is_number(value) for value in (0, -1.5, 1e308, 10**300)] == [True] * 4
    assert not any(map(is_number, others))
