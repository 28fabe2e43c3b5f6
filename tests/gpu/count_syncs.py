"""Worker: a run that prints how often each step waits for the GPU, and where.

`torch.cuda.set_sync_debug_mode` warns of every call that blocks the process until the GPU is
through: one in a micro-batch leaves the GPU idle while Python prepares what comes next.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch

from dtrain import train
from dtrain.training import train_step, trainer


def call_sites(caught: list[warnings.WarningMessage]) -> Counter[str]:
    """Where each wait was asked for."""
    return Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchron" in str(w.message))


def watched(function: Any, name: str, counts: dict[str, Counter[str]]) -> Any:
    """`function`, with the waits in it counted under `name`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = function(*args, **kwargs)
        counts.setdefault(name, Counter()).update(call_sites(caught))
        return result

    return call


def main() -> int:
    """Count in every step but the first two, which compile and allocate."""
    steps: list[dict[str, Counter[str]]] = []
    plain_step, plain_losses = trainer.train_step, train_step.compute_loss

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        counts: dict[str, Counter[str]] = {}
        steps.append(counts)
        train_step.compute_loss = watched(plain_losses, "forward", counts)
        result = watched(plain_step, "step", counts)(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("default")
        return result

    trainer.train_step = counted_step
    status = train.main(sys.argv[1:])
    worst = {
        name: max((counts.get(name, Counter()) for counts in steps[2:]), key=Counter.total)
        for name in ("forward", "step")
    }
    print("SYNCS " + json.dumps({name: dict(where) for name, where in worst.items()}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
