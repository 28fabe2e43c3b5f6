"""Printing never raises: a closed terminal, a dead reader, a full disk, another encoding."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PRINTS = """
import os, sys
from dtrain.core.output import lost_output, protect_output
protect_output()
from dtrain.core.log import say, warn
print("ready", flush=True)
os.read(0, 1)  # until nobody reads any more
for stream in (sys.stdout, sys.stderr):
    print("a \\u2192 \\ud800 b" * 100, file=stream, flush=True)
    print("more", file=stream)
say("said \\u2192")
warn("warned \\u2192")
error = lost_output()
with open(sys.argv[1], "x") as report:
    print(error.errno if error else 0, file=report)
"""
UNBUFFERED = ["-u"]  # as torchrun starts the ranks


def lost(tmp_path: Path, options: list[str], end: Callable[[], None], output: int) -> int:
    """The error that a process reports which prints after `end`."""
    command = [sys.executable, *options, "-c", PRINTS, str(tmp_path / "report")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
    end()
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    return int((tmp_path / "report").read_text())


@pytest.mark.parametrize("options", [[], UNBUFFERED])
def test_closed_terminal_is_no_error(tmp_path: Path, options: list[str]) -> None:
    outer, inner = pty.openpty()

    def close() -> None:
        assert os.read(outer, 5) == b"ready"
        os.close(outer)

    assert lost(tmp_path, options, close, inner) == 0  # nobody misses it
    os.close(inner)


@pytest.mark.parametrize("options", [[], UNBUFFERED])
def test_dead_reader_is_no_error(tmp_path: Path, options: list[str]) -> None:
    reader, writer = os.pipe()

    def close() -> None:
        assert os.read(reader, 5) == b"ready"
        os.close(reader)

    assert lost(tmp_path, options, close, writer) == 0
    os.close(writer)


@pytest.mark.parametrize("options", [[], UNBUFFERED])
def test_full_disk_is_reported_and_nothing_else(tmp_path: Path, options: list[str]) -> None:
    with open("/dev/full", "w") as full:
        assert lost(tmp_path, options, lambda: None, full.fileno()) == errno.ENOSPC


def test_ascii_shows_the_code_of_other_characters(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PRINTS, str(tmp_path / "report")]
    environ = {"PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, input=b"\n", capture_output=True, env=environ, check=True)
    assert b"a \\u2192 \\ud800 b" in done.stdout and b"said \\u2192" in done.stdout


def test_closed_streams_are_not_taken_by_files(tmp_path: Path) -> None:
    """A file that is opened later would get the number of stdout, and what libraries print."""
    script = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    command = [*script, sys.executable, "-c", PRINTS, str(tmp_path / "report")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "report").read_text() == "0\n"


@pytest.mark.parametrize(("redirect", "status"), [("> /dev/full", 2), ("| head -n 1", 0)])
def test_result_that_is_lost_is_an_error(redirect: str, status: int) -> None:
    """A command whose output is its result, unlike a run."""
    script = f'set -o pipefail; "{sys.executable}" -m dtrain plan 7b-lora {redirect}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert ("No space left" in done.stderr) == (status == 2)
