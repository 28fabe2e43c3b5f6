"""Kills, full disks, bit flips and NaN are found, and the previous checkpoint remains."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.checkpoints import (
    Checkpoint,
    ParameterShard,
    Saver,
    clean_leftovers,
    newest_complete,
    remove_old_checkpoints,
)
from dtrain.core.errors import Exit, UserError

FLIPS, CUTS, KILLS = 300, 100, 25
BIG = {"w": (700, 500)}  # 4.2 MB with its moments
FILE_OPERATIONS = ("open", "os.mkdir", "os.remove", "os.rename")
OPERATIONS, NEVER = 30, -1  # of a few saves


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _damaged(path: Path, damage: Callable[[bytearray], None]) -> bytes:
    """Damage a file in place and return its former content."""
    before = path.read_bytes()
    content = bytearray(before)
    damage(content)
    path.write_bytes(content)
    return before


def _assert_found(folder: Path, path: Path) -> None:
    newest, reasons = newest_complete(folder)
    assert newest is not None and newest.step == 1, path
    assert len(reasons) == 1 and path.name in reasons[0] and "step 2" in reasons[0]


def test_every_bit_flip_is_found(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1)
    files = _files(kit.save(tmp_path, 2, rate=1e-5, name="é"))
    draw = random.Random(0)

    def flip(content: bytearray) -> None:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)

    for count in range(FLIPS):
        path = files[count % len(files)]
        before = _damaged(path, flip)
        _assert_found(tmp_path, path)
        path.write_bytes(before)
    newest, reasons = newest_complete(tmp_path)
    assert newest is not None and newest.step == 2 and not reasons


def test_manifest_edit_that_changes_no_value_is_found(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1)
    manifest = kit.save(tmp_path, 2, rate=1e-7) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("1e-7", "1E-7"))
    _assert_found(tmp_path, manifest)


def test_every_truncation_is_found(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1)
    files = _files(kit.save(tmp_path, 2))
    draw = random.Random(0)

    def cut(content: bytearray) -> None:
        del content[draw.randrange(len(content)) :]

    for count in range(CUTS):
        path = files[count % len(files)]
        before = _damaged(path, cut)
        _assert_found(tmp_path, path)
        path.write_bytes(before)


@pytest.mark.parametrize("gone", ["manifest.json", "rank-00001.safetensors"])
def test_a_missing_file_is_found(kit: Any, tmp_path: Path, gone: str) -> None:
    kit.save(tmp_path, 1)
    path = kit.save(tmp_path, 2) / gone
    path.unlink()
    _assert_found(tmp_path, path)


def kill_at_operation(folder: Path, number: int) -> None:
    """Have this process kill itself before its operation `number` on the files of a folder."""
    operations = itertools.count()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        is_ours = event in FILE_OPERATIONS and str(arguments[0]).startswith(str(folder))
        if is_ours and next(operations) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def test_complete_checkpoints_survive_killed_ranks(kit: Any, start: Any, tmp_path: Path) -> None:
    # The last step that rank 0 called complete; it could be killed with the lock.
    completed = multiprocessing.Value("q", 0, lock=False)

    def train(rank: int, attempt: str, first: int, last_operation: int) -> None:
        kill_at_operation(tmp_path, last_operation)
        saver = Saver(tmp_path, rank=rank, ranks=2, attempt=attempt)
        for step in range(first, first + 1000):
            saver.save(step, kit.rank_shards(kit.whole(step, BIG), rank, 2, BIG), {})
            saver.wait()
            if rank == 0:
                completed.value = step

    draw, newest, interrupted = random.Random(0), 0, 0
    for attempt in range(KILLS):
        clean_leftovers(tmp_path)
        victim, last = draw.randrange(2), draw.randrange(OPERATIONS)
        operations = [last if rank == victim else NEVER for rank in range(2)]
        ranks = [
            start(train, rank, f"a{attempt}", newest + 1, operations[rank]) for rank in range(2)
        ]
        ranks[victim].join()
        for process in ranks:
            process.kill()
            process.join()
        interrupted += any(path.name.startswith(".step-") for path in tmp_path.iterdir())
        checkpoint, _ = newest_complete(tmp_path)
        newest = checkpoint.step if checkpoint else 0
        assert newest >= completed.value
        if checkpoint is not None:
            kit.assert_holds(checkpoint, kit.whole(newest, BIG))
        remove_old_checkpoints(tmp_path, 2, best=False, every=None)
    assert newest > 0 and interrupted > 0


@pytest.fixture
def small_disk(mount_disk) -> Path:
    """A file system of 4 MiB."""
    return mount_disk("4m")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_earlier_checkpoint(kit: Any, small_disk: Path, ranks: int) -> None:
    shapes = {"w": (120_000,)}  # 1.44 MB a checkpoint: the third does not fit
    savers = [Saver(small_disk, rank=r, ranks=ranks, attempt="a") for r in range(ranks)]

    def save(step: int) -> None:
        for rank, saver in enumerate(savers):
            saver.save(step, kit.rank_shards(kit.whole(step, shapes), rank, ranks, shapes), {})
        for saver in savers:  # rank 0 quotes rank 1; rank 1 may find the folder removed by rank 0
            saver.wait()

    save(1)
    save(2)
    with pytest.raises(UserError, match=r"No space left[\s\S]*output\.keep_checkpoints"):
        save(3)
    _drain(savers)
    checkpoint, _ = newest_complete(small_disk)
    assert checkpoint is not None and checkpoint.step == 2
    kit.assert_holds(checkpoint, kit.whole(2, shapes))
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-000001", "step-000002"]
    remove_old_checkpoints(small_disk, 1, best=False, every=None)
    save(3)
    kit.assert_holds(Checkpoint.open(small_disk / "step-000003"), kit.whole(3, shapes))


def _drain(savers: list[Saver]) -> None:
    for saver in savers:
        with suppress(UserError):
            saver.wait()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_not_saved(kit: Any, tmp_path: Path, poison: float) -> None:
    kit.save(tmp_path, 1)
    whole = kit.whole(2)
    whole["layers.0.b"]["exp_avg"][100] = poison
    savers = [Saver(tmp_path, rank=r, ranks=2, attempt="a") for r in range(2)]
    for rank, saver in enumerate(savers):
        saver.save(2, kit.rank_shards(whole, rank, 2), {})
    for saver in savers:  # rank 1's tensor it is, and rank 0 says so too
        with pytest.raises(UserError, match=r"layers\.0\.b \(exp_avg, from element 96\)"):
            saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_next_save_reports_the_failure_of_the_last(kit: Any, tmp_path: Path) -> None:
    whole = kit.whole(1)
    whole["layers.1.gate"]["weight"][0] = float("nan")
    saver = Saver(tmp_path, rank=0, ranks=1, attempt="a")
    saver.save(1, kit.rank_shards(whole, 0, 1), {})
    with pytest.raises(UserError, match="NaN") as refused:
        saver.save(2, kit.rank_shards(kit.whole(2), 0, 1), {})
    assert refused.value.status == Exit.NON_FINITE
    saver.save(3, kit.rank_shards(kit.whole(3), 0, 1), {})
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_nan_in_a_shard_with_valid_hashes_is_refused(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kit.whole(1)
    whole["layers.0.b"]["weight"][120] = float("nan")
    monkeypatch.setattr("dtrain.checkpoints.shard_file.all_finite", lambda tensor: True)
    saver = Saver(tmp_path, rank=0, ranks=1, attempt="a")
    saver.save(1, kit.rank_shards(whole, 0, 1), {})
    saver.wait()
    monkeypatch.undo()
    checkpoint, _ = newest_complete(tmp_path)
    assert checkpoint is not None
    with pytest.raises(UserError, match=r"layers\.0\.b weight contains NaN"):
        checkpoint.restore(kit.rank_shards(kit.whole(2), 0, 1))
    with pytest.raises(UserError, match=r"layers\.0\.b weight contains NaN"):
        checkpoint.read("layers.0.b", "weight", 100, 130)


def test_rank_that_never_writes_is_named(kit: Any, tmp_path: Path) -> None:
    saver = Saver(tmp_path, rank=0, ranks=3, attempt="a", timeout_seconds=0.05)
    saver.save(1, kit.rank_shards(kit.whole(1), 0, 1), {})
    with pytest.raises(UserError, match=r"ranks \[1, 2\] did not write") as refused:
        saver.wait()
    assert refused.value.status == Exit.HANG
    assert newest_complete(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ([(0, 4), (5, 10)], "elements 4 to 5 are missing"),
        ([(0, 6), (4, 10)], "elements from 4 were saved twice, once in rank-00001"),
        ([(0, 4), (4, 9)], "elements 9 to 10 are missing"),
        ([(0, 0), (10, 10)], "no weight was saved"),
    ],
)
def test_gaps_and_overlaps_are_refused(
    tmp_path: Path, ranges: list[tuple[int, int]], said: str
) -> None:
    savers = [Saver(tmp_path, rank=r, ranks=2, attempt="a") for r in range(2)]
    for saver, (first, last) in zip(savers, ranges, strict=True):
        saver.save(
            1, [ParameterShard("w", (10,), first, last, {"weight": torch.ones(last - first)})], {}
        )
    savers[1].wait()
    with pytest.raises(RuntimeError, match=said):
        savers[0].wait()
    assert not list(tmp_path.iterdir())


def test_a_broken_checkpoint_of_the_same_step_is_replaced(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1)
    (kit.save(tmp_path, 2) / "rank-00000.safetensors").write_bytes(b"")
    kit.save(tmp_path, 2)
    newest, reasons = newest_complete(tmp_path)
    assert newest is not None and newest.step == 2 and not reasons
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_state_that_is_not_json_serializable_is_refused(tmp_path: Path, value: Any) -> None:
    saver = Saver(tmp_path, rank=0, ranks=1, attempt="a")
    with pytest.raises((ValueError, TypeError)):
        saver.save(1, [], {"loss": value})
