"""A plan's child process that warns a lot, writes broken text, or dies early."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.core.errors import UserError
from dtrain.planning import model_process
from dtrain.planning.model_process import LINE_PREFIX, run_child

WARNINGS = "import sys; sys.stderr.buffer.write(b'\\xff' * 300_000)"
BROKEN = "sys.stdout.buffer.write(b'caf\\xe9\\n'); sys.stdout.flush()"
ANSWER = f"print({LINE_PREFIX!r} + '{{\"done\": 1}}')"


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`child(line, …)`: the child process runs these lines."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(model_process, "CHILD", "own_child")
    return lambda *lines: (tmp_path / "own_child.py").write_text("\n".join(lines))


def test_warnings_and_text_in_another_encoding_are_no_obstacle(child) -> None:
    child(WARNINGS, "sys.stdin.read()", BROKEN, ANSWER)
    assert {"done": 1} in list(run_child({}, "fix"))


def test_a_child_that_dies_before_it_reads_is_reported(child) -> None:
    child("raise SystemExit('out of memory')")
    with pytest.raises(UserError, match="ended with status 1: out of memory"):
        list(run_child({"large": "x" * 10**6}, "fix"))
