"""The merge at a stage's end: ranks that see the same files share its shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dtrain.core.hashes import fingerprint
from dtrain.core.locks import ShardLocks
from dtrain.distributed.world import World
from dtrain.merge.merge import default_processes
from dtrain.models.weight_files import weight_files


def merge_together(world: World, base: Path, lock_file: Path, merge: Callable[[int], None]) -> None:
    """Call `merge` on every rank that can share it; all is done when this returns.

    A rank stays out where the base has other times, as in a cache of another node's own, and where
    it does not see the first rank's locks, as on a file system that keeps them to one node.

    Args:
        lock_file: file of locks in a folder that all ranks write to.
        merge: takes the number of shards that this rank may rewrite at once.
    """
    claims = ShardLocks(lock_file)
    try:
        if world.is_first:
            claims.acquire(0)
        seen = _seen(base)
        alike = world.broadcast_text(seen) == seen
        if world.is_first or (alike and not claims.acquire(0)):
            merge(max(default_processes() // world.local_size, 1))
        world.barrier()
    finally:
        claims.close()
    if world.is_first:
        lock_file.unlink(missing_ok=True)


def _seen(base: Path) -> str:
    files = [(path.name, path.stat()) for path in weight_files(base)]
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
