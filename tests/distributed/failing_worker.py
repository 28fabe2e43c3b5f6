"""A worker that fails in its first step on one rank, as under NCCL.

Under NCCL the other ranks wait in a collective that never returns, and so does a rank that leaves
the process group meanwhile.
Arguments: FAILING_RANK crash|memory|exit|interrupt RECIPE [key=value …]
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import dtrain.training.trainer
from dtrain import train
from dtrain.core.processes import exit_at_once

ERRORS = {
    "crash": RuntimeError("boom"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "exit": SystemExit(0),
    "interrupt": KeyboardInterrupt(),
}


def never_returns(*_: object, **__: object) -> Any:
    """A call that waits for a rank that will not come."""
    time.sleep(3600)


def main(arguments: list[str]) -> int:
    """Plant the fault, then be the worker."""
    failing_rank, kind = int(arguments[0]), arguments[1]

    def first_step(*_: object, **__: object) -> Any:
        if int(os.environ["RANK"]) == failing_rank:
            raise ERRORS[kind]
        never_returns()

    dtrain.training.trainer.train_step = first_step
    dist.destroy_process_group = never_returns
    return train.main(arguments[2:])


if __name__ == "__main__":  # under torchrun
    exit_at_once(main(sys.argv[1:]))
