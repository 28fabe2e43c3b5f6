"""Ranks that take part in a merge between stages; real ones: distributed/test_shared_merge.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.pipeline.stage_model import _file_state, merge_on_ranks

LOCKS = "merge.locks"
HOLDS = """
import sys
from pathlib import Path
from dtrain.core.locks import ShardLocks
ShardLocks(Path(sys.argv[1])).acquire(0)
print("taken", flush=True)
sys.stdin.read()
"""


class Rank:
    """One rank's world, whose first rank sees `first`."""

    def __init__(self, is_first: bool, first: str, local_size: int = 1) -> None:
        self.is_first, self._first, self.local_size = is_first, first, local_size

    def broadcast_text(self, text: str) -> str:
        return text if self.is_first else self._first

    def barrier(self) -> None:
        pass


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "base"


def calls(world: Rank, base: Path) -> list[int]:
    called: list[int] = []
    merge_on_ranks(world, base, base.parent / LOCKS, called.append)  # type: ignore[arg-type]
    return called


def test_rank_0_always_merges_and_leaves_no_files(base: Path) -> None:
    assert calls(Rank(True, "", local_size=10_000), base) == [1]
    assert not (base.parent / LOCKS).exists()


@pytest.mark.parametrize(("first", "held"), [("same", True), ("same", False), ("other", True)])
def test_other_rank_merges_if_it_sees_the_files_and_lock_of_rank_0(
    base: Path, first: str, held: bool
) -> None:
    world = Rank(False, _file_state(base) if first == "same" else "files of another node")
    command = [sys.executable, "-c", HOLDS, str(base.parent / LOCKS)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout and holder.stdout.readline() == b"taken\n"
    if not held:  # as on a file system that keeps locks to one node
        holder.communicate()
    assert bool(calls(world, base)) == (first == "same" and held)
    holder.communicate()
