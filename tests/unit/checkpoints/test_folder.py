"""Listing, cleaning and retention in a stage's checkpoint folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dtrain.checkpoints import (
    Checkpoint,
    Saver,
    clean_leftovers,
    list_checkpoints,
    newest_complete,
    remove_old_checkpoints,
)
from dtrain.checkpoints.folder import best_step
from dtrain.config.schema import Output
from dtrain.training.checkpointer import Checkpointer


def _steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def _unfinished(folder: Path, step: int) -> None:
    work = folder / f".step-{step:06d}.deadx1"
    work.mkdir()
    (work / "rank-00000.safetensors").write_bytes(b"12345")


def test_missing_folder_has_no_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    assert newest_complete(folder) == (None, [])
    assert list_checkpoints(folder) == []
    assert clean_leftovers(folder) == []


def test_list_describes_every_checkpoint(kit: Any, tmp_path: Path) -> None:
    for step, loss in ((1, 3.5), (2, None), (3, 2.5)):
        kit.save(tmp_path, step, held_out_loss=loss)
    shard = tmp_path / "step-000003/rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (tmp_path / "step-000002/manifest.json").unlink()
    _unfinished(tmp_path, 4)

    listed = list_checkpoints(tmp_path)
    assert [
        (checkpoint.step, checkpoint.loss, checkpoint.complete, checkpoint.verified)
        for checkpoint in listed
    ] == [
        (1, 3.5, True, None),
        (2, None, False, None),
        (3, 2.5, True, None),
        (4, None, False, None),
    ]
    assert listed[3].size == 5 and "not finished" in listed[3].problem

    verified = list_checkpoints(tmp_path, verify=True)
    assert [(checkpoint.complete, checkpoint.verified) for checkpoint in verified[:3:2]] == [
        (True, True),
        (False, False),
    ]
    assert "rank-00000.safetensors" in verified[2].problem


def test_checkpoint_that_the_run_removes_meanwhile_is_not_listed(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        kit.save(tmp_path, step)
    open_checkpoint = Checkpoint.open

    def remove_and_open(path: Path) -> Checkpoint:
        if path.name == "step-000001":
            shutil.rmtree(path)
        checkpoint = open_checkpoint(path)
        if path.name == "step-000002":
            shutil.rmtree(path)
        return checkpoint

    monkeypatch.setattr(Checkpoint, "open", remove_and_open)
    assert _steps(tmp_path) == [3]


def test_resume_reports_skipped_newer_checkpoints(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1)
    (kit.save(tmp_path, 2) / "manifest.json").write_text("{}")
    _unfinished(tmp_path, 1)
    _unfinished(tmp_path, 3)
    newest, reasons = newest_complete(tmp_path)
    assert newest is not None and newest.step == 1
    assert reasons[0] == "the save of step 3 was not finished"
    assert reasons[1].startswith("step 2 cannot be used:") and len(reasons) == 2


def test_cleanup_removes_only_leftovers(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1)
    _unfinished(tmp_path, 2)
    (tmp_path / ".removed.step-000001.77").mkdir()
    (tmp_path / ".lock").touch()
    clean_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step-000001"]


LOSSES = {1: 4.0, 2: 2.0, 3: 2.0, 4: None, 5: 3.0, 6: 2.5}


@pytest.mark.parametrize(
    ("newest", "best", "every", "kept"),
    [
        (2, False, None, [5, 6]),
        (1, True, None, [2, 6]),
        (1, False, 3, [3, 6]),
        (2, True, 4, [2, 4, 5, 6]),
        (0, False, None, [6]),
        (9, True, 1, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_newest_best_and_every_nth_checkpoint_are_kept(
    kit: Any, tmp_path: Path, newest: int, best: bool, every: int | None, kept: list[int]
) -> None:
    for step, loss in LOSSES.items():
        kit.save(tmp_path, step, score=loss)
    removed = remove_old_checkpoints(tmp_path, newest, best, every)
    assert _steps(tmp_path) == kept
    assert removed == [step for step in LOSSES if step not in kept]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_scores_of_another_set_or_metric_are_not_compared() -> None:
    pairs, texts = {"set": "pairs", "metric": "accuracy"}, {"set": "texts", "metric": "loss"}
    states = {1: {"score": -0.9, "watched": pairs}, 2: {"score": 2.5, "watched": texts}}
    states |= {3: {"score": 3.0, "watched": texts}, 4: {"score": None, "watched": texts}}
    assert best_step(states) == 2
    assert best_step({4: states[4], 5: {}}) is None


def test_a_damaged_best_checkpoint_is_passed_over(kit: Any, tmp_path: Path, capfd: Any) -> None:
    alone: Any = SimpleNamespace(
        rank=0, size=1, is_first=True, broadcast_text=str, sum=lambda values: values
    )
    output = Output(folder=str(tmp_path))
    checkpointer = Checkpointer(
        tmp_path, alone, inputs={}, dtype="float32", every_steps=1, output=output
    )
    for step, score in ((1, 2.0), (2, 1.0), (3, None)):
        kit.save(tmp_path, step, score=score)
    last = {"score": 3.0, "held_out_loss": 3.0}
    checkpoint, measured = checkpointer.best(last, 3)
    assert (checkpoint.step, measured["score"]) == (2, 1.0)
    shard = tmp_path / "step-000002/rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    checkpoint, measured = checkpointer.best(last, 3)
    assert (checkpoint.step, measured["score"]) == (1, 2.0)
    assert "step 2 is better, but cannot be used" in "".join(capfd.readouterr())
    checkpoint, measured = checkpointer.best({"score": 1.5}, 3)
    assert (checkpoint.step, measured["score"]) == (3, 1.5)


def test_a_broken_checkpoint_does_not_count_as_one_of_the_newest(kit: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        kit.save(tmp_path, step)
    for step in (1, 4):
        (tmp_path / f"step-00000{step}/manifest.json").unlink()
    assert remove_old_checkpoints(tmp_path, 2, False, None) == [1]
    assert _steps(tmp_path) == [2, 3, 4]


def test_checkpoint_with_unknown_files_is_kept(kit: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        kit.save(tmp_path, step)
    (tmp_path / "step-000001/odd.bin").touch()
    assert remove_old_checkpoints(tmp_path, 1, False, None) == [2]
    assert _steps(tmp_path) == [1, 3]


def test_older_checkpoints_are_removed_in_the_background_after_publishing(
    kit: Any, tmp_path: Path
) -> None:
    seen = []

    def published(path: Path) -> None:
        seen.append(path.name)
        remove_old_checkpoints(tmp_path, 1, False, None)

    saver = Saver(tmp_path, rank=0, ranks=1, attempt="a", on_published=published)
    for step in (1, 2):
        saver.save(step, kit.rank_shards(kit.whole(step), 0, 1), {})
    saver.wait()
    assert seen == ["step-000001", "step-000002"] and _steps(tmp_path) == [2]
