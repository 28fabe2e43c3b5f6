"""JSON lines: characters that other readers take for the end of a line do not end one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import dtrain
from dtrain.augmentation.request_pool import Journal
from dtrain.core.files import parse_json_lines, read_json_lines, read_tail
from dtrain.core.run_dir import RunDir
from dtrain.monitoring.metrics import Metrics, read_metrics
from dtrain.monitoring.starts import read_starts
from dtrain.planning import calibration
from dtrain.serving.generate import read_prompts

# All at which `str.splitlines` cuts, and a backslash.
NAME = "a\u2028b\u2029c\x85d\x1ce\x1df\x1eg\x0bh\x0ci\\"
# Readers of other texts: of the kernel, of nvidia-smi, of a recipe's comments, of errors.
READERS_OF_OTHER_TEXT = {
    "core/cpp_build.py",
    "core/errors.py",
    "core/files.py",
    "core/hardware.py",
    "data/text_checks.py",
    "distributed/tensor_utils.py",
    "recipes/__init__.py",
    "samples/smollm2.py",
}


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = json.dumps({"name": NAME}, ensure_ascii=False)
    assert parse_json_lines(f"{text}\n[1]\nno\n\n{text}\n{text[:-1]}") == [{"name": NAME}] * 2
    assert read_json_lines(tmp_path / "none") == []


def test_nothing_else_cuts_text_into_lines() -> None:
    root = Path(dtrain.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"\bsplitlines\b", path.read_text())
    }
    assert found == READERS_OF_OTHER_TEXT


def test_every_file_of_lines_keeps_such_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1, "sources": {NAME: {"loss": 1.0}}})
    metrics.close()
    Metrics(tmp_path / "metrics.jsonl", 1).close()  # as a resume does
    assert [line["sources"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        {NAME: {"loss": 1.0}}
    ]

    start = {"started": 1.0, "host": NAME, "nodes": 1, "ranks": 1, "device": "cpu"}
    RunDir(tmp_path).starts.write_text(json.dumps(start, ensure_ascii=False) + "\n")
    assert [start.host for start in read_starts(RunDir(tmp_path))] == [NAME]

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(f"{json.dumps({'prompt': NAME}, ensure_ascii=False)}\n" * 3)
    assert [getattr(prompt, "row", prompt) for prompt in read_prompts(prompts)] == [
        {"prompt": NAME}
    ] * 3

    journal = Journal(tmp_path / "journal.jsonl", {"row": int})
    journal.write({"row": 1, "reply": NAME})
    journal.close()
    again = Journal(tmp_path / "journal.jsonl", {"row": int})
    assert [line["reply"] for line in again.lines()] == [NAME]

    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    text = json.dumps({"gpu": NAME, "engine": "ddp", "method": "lora", "versions": {}})
    names = {name: 1.0 for name in calibration.FIGURES}
    record = json.loads(text) | names
    monkeypatch.setattr(calibration, "CalibrationRecord", dict)
    file = calibration.calibration_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert [line["gpu"] for line in calibration.load_records()] == [NAME]


def test_the_end_of_a_log_is_read_whatever_the_log_is(tmp_path: Path) -> None:
    log, pipe = tmp_path / "log", tmp_path / "pipe"
    assert read_tail(log) == ""
    os.mkfifo(pipe)
    assert read_tail(pipe) == read_tail(tmp_path) == ""
    log.write_bytes(b"first\nsecond \xc3\xa9\nlast\n")
    assert read_tail(log) == "first\nsecond \u00e9\nlast\n"
    assert read_tail(log, 7) == "\ufffd\nlast\n"
