"""Between two stages every rank merges shards of the base; after a kill the merge is resumed."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dtrain.core.weight_files import weight_files
from dtrain.samples.make import ensure


@pytest.fixture
def base(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model of `tiny` in several shards."""
    monkeypatch.setenv("DTRAIN_CACHE", str(cache))
    whole, folder = ensure("tiny-llama"), tmp_path / "base"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(weight_files(folder)) > 4
    return folder


@pytest.mark.parametrize("method", ["{kind: lora, r: 8}", "{kind: full}"])
def test_ranks_merge_together_and_resume_after_a_kill(
    start_ranks: Callable,
    weights: Callable[[Path], str],
    base: Path,
    tmp_path: Path,
    method: str,
) -> None:
    settings = [f"model.base={base}", *(f"stages.{s}.method={method}" for s in ("domain", "task"))]
    said = tmp_path / "said"
    said.touch()
    with_worker = {"worker": "merge_worker", "env": {"SAID": str(said)}}
    start_ranks(*settings, worker="merge_worker", env={"SAID": str(said), "VICTIM": "1"}).wait(
        1, -signal.SIGKILL
    )
    assert {line.split()[0] for line in said.read_text().splitlines()} == {"0", "1"}
    said.write_text("")
    done = start_ranks(*settings, **with_worker).wait(0)
    shard_starts = [line.split() for line in said.read_text().splitlines()]
    for stage in ("domain", "task"):
        stage_starts = [(rank, shard) for rank, name, shard in shard_starts if name == stage]
        assert {rank for rank, _ in stage_starts} == {"0", "1"}
        assert len({shard for _, shard in stage_starts}) == len(stage_starts), (
            "no shard was written twice"
        )
    assert not [*done.folder.rglob(".merging"), *done.folder.rglob(".*.making")]
    assert [path.name for path in weight_files(done.folder / "task" / "merged")] == [
        path.name for path in weight_files(base)
    ]
    again = start_ranks(*settings, folder="again").wait(0)
    assert weights(done.folder) == weights(again.folder)
