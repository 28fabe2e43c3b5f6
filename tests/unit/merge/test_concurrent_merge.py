"""Several processes share a merge, and it survives a killed process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dtrain.cli.merge import merge
from dtrain.core.hashes import file_hash
from dtrain.merge import resumable_dir
from dtrain.merge.resumable_dir import ResumableDir

ROOT = Path(__file__).parents[3]
SHARDS, PROCESSES = 7, 3
# `dtrain merge` that says which shard it begins, and begins its first when all others do; the
# victim gets no further.
MERGE = """
import os, signal, sys, time
import dtrain.merge.merge as module
from dtrain.cli import app

said, processes, victim = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "victim"
rewrite = module.rewrite_file

def begin(path, *others):
    with open(said, "a") as file:
        file.write(f"{os.getpid()} {path.name}\\n")
    if victim:
        signal.pause()
    while len({line.split()[0] for line in open(said)}) < processes:
        time.sleep(0.01)
    return rewrite(path, *others)

module.rewrite_file = begin
app(["merge", "--processes", "1", *sys.argv[4:]])
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"layers.{number}.weight" for number in range(SHARDS)]
    files = {name: f"model-{number}.safetensors" for number, name in enumerate(names)}
    torch.manual_seed(0)
    for name, file in files.items():
        save_file({name: torch.randn(96, 64)}, folder / file)
    index = str({"weight_map": files}).replace("'", '"')
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for number in range(SHARDS):
        key = f"base_model.model.layers.{number}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 64)
        tensors[f"{key}.lora_B.weight"] = torch.randn(96, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'
    (folder / "adapter_config.json").write_text(config)
    return folder


def start(said: Path, processes: int, role: str, *paths: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", MERGE, said, str(processes), role, *paths]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(said: Path) -> list[list[str]]:
    return [line.split() for line in said.read_text().splitlines()] if said.exists() else []


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files but the card, which has the folder's name."""
    return {path.name: file_hash(path) for path in folder.iterdir() if path.name != "README.md"}


def test_three_processes_finish_a_merge_after_one_is_killed(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    said, out = tmp_path / "said", tmp_path / "out"
    victim = start(said, PROCESSES, "victim", base, adapter, out)
    until(lambda: bool(lines(said)))
    workers = [start(said, PROCESSES, "", base, adapter, out) for _ in range(PROCESSES - 1)]
    until(lambda: len({name for _, name in lines(said)}) == SHARDS)
    assert not out.exists()
    victim.kill()
    victim.communicate()
    for process in workers:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors.decode()
    taken = Counter(name for _, name in lines(said))
    lost = next(name for process, name in lines(said) if int(process) == victim.pid)
    assert taken.pop(lost) == 2 and set(taken.values()) == {1} and len(taken) == SHARDS - 1
    assert len({process for process, _ in lines(said)}) == PROCESSES
    alone = start(tmp_path / "alone", 1, "", base, adapter, tmp_path / "whole")
    assert alone.wait(120) == 0
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / ".out.making").exists()


def test_one_that_joins_while_another_publishes_has_nothing_left_to_do(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, bytes_written = tmp_path / "out", ResumableDir.bytes_written

    def measure_late(work: ResumableDir) -> int:
        if not out.exists():  # this process has joined, and sees no result yet
            assert start(tmp_path / "said", 1, "", base, adapter, out).wait(120) == 0
        return bytes_written(work)

    monkeypatch.setattr(ResumableDir, "bytes_written", measure_late)
    merge([str(base), str(adapter), str(out)])
    assert (out / "merge.json").is_file() and not (tmp_path / ".out.making").exists()


def test_another_merge_to_the_same_folder_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    said, out = tmp_path / "said", tmp_path / "out"
    first = start(said, 1, "victim", base, adapter, out)
    until(lambda: bool(lines(said)))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 9}')
    second = start(tmp_path / "none", 1, "", base, adapter, out)
    assert b"is being made by another process" in second.communicate(timeout=120)[1]
    assert second.returncode == 1 and not out.exists()
    assert (tmp_path / ".out.making" / "model").is_dir()
    first.kill()
    first.communicate()


def test_a_process_may_join_while_another_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = ResumableDir(tmp_path / "out", {"of": "this"})
    (work.target / "file").write_text("whole")
    joins = (
        "import sys; from pathlib import Path; "
        "from dtrain.merge.resumable_dir import ResumableDir; "
        "work = ResumableDir(Path(sys.argv[1]), {'of': 'this'}); "
        "assert work.is_done('file'); work.close()"
    )

    def join(folder: Path) -> None:  # the folder is renamed, and the work not yet removed
        if folder == tmp_path:
            subprocess.run([sys.executable, "-c", joins, str(tmp_path / "out")], check=True)

    monkeypatch.setattr(resumable_dir, "fsync_folder", join)
    assert work.claim_publishing()
    work.publish({"file"})
    work.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
