"""A rank of a run that starts its first shard of a merge only when every other rank starts one.

Writes to the file $SAID which rank starts which shard; rank $VICTIM then kills itself.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import dtrain.merge.merge as module
from dtrain import train

said, rank, ranks = Path(os.environ["SAID"]), os.environ["RANK"], int(os.environ["WORLD_SIZE"])
rewrite = module.rewrite_file


def ranks_at_merge(stage: str) -> set[str]:
    """The ranks that have started a shard of this stage's model."""
    lines = (line.split() for line in said.read_text().splitlines())
    return {line[0] for line in lines if line[1] == stage}


def rewrite_together(source: Path, target: Path, *rest: Any) -> tuple[str, str]:
    """Rewrite a shard once every rank has started one."""
    stage = target.parents[2].name
    with open(said, "a", encoding="utf-8") as file:
        file.write(f"{rank} {stage} {target.name}\n")
    while len(ranks_at_merge(stage)) < ranks:
        time.sleep(0.01)
    if os.environ.get("VICTIM") == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return rewrite(source, target, *rest)


def main(arguments: list[str]) -> int:
    """Run the recipe on this rank."""
    module.rewrite_file = rewrite_together
    return train.main(arguments)
