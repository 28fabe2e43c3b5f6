"""Limits of the shell are reported before anything else fails; Ctrl-C gives no traceback."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest

from dtrain.core.errors import Exit
from dtrain.core.process_limits import too_many_files


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [("NOFILE", 32, "may open 32"), ("AS", 1_500_000_000, "a process may reserve 1.5")],
)
@pytest.mark.parametrize("command", [["dtrain", "run"], ["dtrain.train"]])
def test_a_limit_that_no_run_fits_into_is_told(limit, value, said, command, tmp_path) -> None:
    kind = getattr(resource, f"RLIMIT_{limit}")
    done = subprocess.run(
        [sys.executable, "-m", *command, "tiny", f"output.folder={tmp_path / 'run'}"],
        preexec_fn=lambda: resource.setrlimit(kind, (value, value)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == Exit.USER_ERROR and said in done.stderr and "ulimit -" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_lower_soft_limit_is_raised() -> None:
    program = (
        "import resource as r\n"
        "from dtrain.core.process_limits import check_process_limits\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (32, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
        "check_process_limits()\n"
        "assert r.getrlimit(r.RLIMIT_NOFILE)[0] > 32\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_libraries_words_for_too_many_files_are_recognized() -> None:
    assert too_many_files(RuntimeError("unable to open file <a>: Too many open files (24)"))
    assert too_many_files(OSError(24, "zu viele"))
    assert too_many_files(OSError(2, "No such file")) is None


# Each stands for a module that the program imports slowly.
@pytest.mark.parametrize("program", ["dtrain", "dtrain.torchrun", "dtrain.train"])
def test_ctrl_c_during_the_imports_gives_no_traceback(program, tmp_path) -> None:
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import os, signal, sys\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('typer', 'psutil', 'rich', 'multiprocessing'):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Slow())\n"
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", program, "--help"]
    done = subprocess.run(
        command,
        env=environ,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == Exit.CTRL_C and "Traceback" not in done.stderr, done.stderr
