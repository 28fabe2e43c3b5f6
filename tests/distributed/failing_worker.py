"""A worker that fails in its first step on one rank, as under NCCL.

Under NCCL the other ranks wait in a collective that never returns, and so does a rank that leaves
the process group meanwhile.
`failing_worker.py FAILING_RANK crash|memory|exit|interrupt RECIPE [key=value …]`
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

import dtrain.training.trainer

ERRORS = {
    "crash": RuntimeError("boom"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "exit": SystemExit(0),
    "interrupt": KeyboardInterrupt(),
}


def never_returns(*_: object, **__: object) -> Any:
    """A call that waits for a rank that will not come."""
    time.sleep(3600)


def main() -> None:
    """Plant the fault, then be the worker."""
    failing_rank, kind = int(sys.argv[1]), sys.argv[2]

    def first_step(*_: object, **__: object) -> Any:
        if int(os.environ["RANK"]) == failing_rank:
            raise ERRORS[kind]
        never_returns()

    dtrain.training.trainer.train_step = first_step
    dist.destroy_process_group = never_returns
    sys.argv[1:] = sys.argv[3:]
    runpy.run_module("dtrain.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
