"""Starts ranks by forking a process that has imported everything: in 0.1 s instead of 7 s.

Reads one JSON object per line from stdin and answers each with a line: {"start": {arguments,
environment, log}} gives the new process's id, {"wait": id} its exit status (negative: the signal).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import deepspeed  # noqa: F401 - imported once for all ranks
import matplotlib.pyplot  # noqa: F401

from dtrain.train import main


def start(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Fork; the child becomes a rank."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        status = main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answer(request: dict[str, Any]) -> int:
    """Handle one request."""
    if "start" in request:
        return start(**request["start"])
    return os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
