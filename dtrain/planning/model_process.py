"""A child process that builds a model with torch, for a plan that itself imports none.

The child (dtrain/simulation) reads a request from stdin and answers with lines of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
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
    child = subprocess.Popen(
        [sys.executable, "-m", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        encoding="utf-8",
    )
    assert child.stdin and child.stdout and child.stderr
    with child:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
        for text in child.stdout:
            prefixed = text.startswith(LINE_PREFIX)
            line = json.loads(text.removeprefix(LINE_PREFIX)) if prefixed else {}
            if "error" in line:
                message, where, hint = line["error"]
                raise UserError(message, where=where, fix=hint)
            yield line
        errors = child.stderr.read().strip().split("\n")
    if child.returncode:
        raise UserError(
            f"the child process ended with status {child.returncode}: {errors[-1] or 'no message'}",
            fix=fix,
        )
