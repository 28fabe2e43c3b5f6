"""A child process that builds a model with torch, for a plan that itself imports none.

The child (dtrain/simulation) reads a request from stdin and answers with lines of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from tempfile import TemporaryFile
from typing import Any

from dtrain.core.errors import UserError

CHILD, LINE_PREFIX = "dtrain.simulation", "dtrain-simulation "


def has_torch() -> bool:
    """Whether the child can run."""
    return find_spec("torch") is not None


def run_child(request: dict[str, Any], fix: str) -> Iterator[dict[str, Any]]:
    """The child's answers to a request.

    Args:
        fix: what to do instead, if the child dies.

    Raises:
        UserError: the child reports an error, or dies.
    """
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with (
        TemporaryFile() as errors,  # a pipe that nobody reads would stop a child that warns a lot
        subprocess.Popen(
            [sys.executable, "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environ,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        assert child.stdin and child.stdout
        with suppress(BrokenPipeError), child.stdin:  # of a child that died, the status is reported
            child.stdin.write(json.dumps(request))
        for text in child.stdout:
            prefixed = text.startswith(LINE_PREFIX)
            line = json.loads(text.removeprefix(LINE_PREFIX)) if prefixed else {}
            if "error" in line:
                message, where, hint = line["error"]
                raise UserError(message, where=where, fix=hint)
            yield line
        status = child.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().split("\n")
    if status:
        raise UserError(
            f"the child process ended with status {status}: {lines[-1] or 'no message'}", fix=fix
        )
