"""kill -9 at random moments of a merge: the next call finishes it, with the same bytes.

    python tests/faults/merge_kill.py [--kills 50] [--seed 0] [--megabytes 60]

Each merge is killed at a random byte of its output; every third is killed again while it resumes.
Processes are forked from one that has imported everything, so that the kills hit the merge; the
last five are started as a user would.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from merge_models import make_adapter, make_model

from dtrain.core.hashes import file_hash, fingerprint
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.resumable_dir import MODEL, making_folder

COMMANDS = 5  # started as a user would


def main() -> int:
    """Kill merges; return 0 if each ended with the bytes of an uninterrupted one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=60)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dtrain-merge-kill-"))
    size = arguments.megabytes / 1000
    model_bytes = make_model(folder / "base", size, shard_bytes=int(size * 1e8))
    make_adapter(folder / "adapter", size)
    assert run(folder, folder / "whole") == 0
    expected = content(folder / "whole")
    shards = len(list((folder / "base").glob("*.safetensors")))
    print(f"{model_bytes / 1e6:.0f} MB in {shards} shards; undisturbed: {expected[:16]}")
    status = kills(folder, expected, model_bytes, arguments.kills, random.Random(arguments.seed))
    shutil.rmtree(folder)
    return status


def kills(folder: Path, expected: str, model_bytes: int, count: int, draw: random.Random) -> int:
    """Kill `count` times; print how far the merges were."""
    states, wrong, done = Counter[str](), 0, 0
    while done < count:
        out = folder / f"out-{done}"
        as_user = done >= count - COMMANDS
        for _ in range(2 if done % 3 == 2 and done + 2 <= count else 1):
            kill(folder, out, draw.uniform(0, 1.02) * model_bytes, draw.uniform(0, 0.05), as_user)
            states[what_is_there(out)] += 1
            done += 1
        if problem := after(folder, out, expected):
            print(f"{out}: {problem}")
            wrong += 1
        else:
            shutil.rmtree(out)
    for state, number in sorted(states.items()):
        print(f"{number:4} kills at: {state}")
    print(f"{done} kills, {wrong} merges with a wrong result")
    return 1 if wrong else 0


def after(folder: Path, out: Path, expected: str) -> str:
    """What is wrong after the next call; empty if the result is correct."""
    if status := run(folder, out):
        return f"exit status {status}"
    if content(out) != expected:
        whole = {path.name: file_hash(path) for path in (folder / "whole").iterdir()}
        hashes = {path.name: file_hash(path) for path in out.iterdir()}
        return f"differs in {sorted(n for n, _ in whole.items() ^ hashes.items())}"
    return "leftovers" if making_folder(out).exists() else ""


def kill(folder: Path, out: Path, moment: float, more: float, as_user: bool) -> None:
    """Start a merge; kill it `more` seconds after it has written `moment` bytes."""
    if as_user:
        command = ["merge", folder / "base", folder / "adapter", out]
        process = subprocess.Popen(
            [sys.executable, "-m", "dtrain", *command], stdout=subprocess.DEVNULL
        )
        wait(out, moment, lambda: process.poll() is None)
        time.sleep(more)
        process.kill()
        process.wait()
        return
    forked = multiprocessing.get_context("fork").Process(target=merge_once, args=(folder, out))
    forked.start()
    wait(out, moment, forked.is_alive)
    time.sleep(more)
    forked.kill()
    forked.join()


def wait(out: Path, moment: float, alive: Callable[[], bool]) -> None:
    """Wait until that many bytes are written, or the merge has ended."""
    while alive() and not out.exists() and written(out) < moment:
        time.sleep(0.002)


def written(out: Path) -> int:
    """Bytes of all shards, complete or not; -1 before the folder exists."""
    total = -1
    with suppress(FileNotFoundError):
        for entry in os.scandir(making_folder(out) / MODEL):
            total += entry.stat().st_size
    return total


def run(folder: Path, out: Path) -> int | None:
    """Merge in another process without a kill; return the exit status."""
    process = multiprocessing.get_context("fork").Process(target=merge_once, args=(folder, out))
    process.start()
    process.join()
    return process.exitcode


def merge_once(folder: Path, out: Path) -> None:
    """Merge two shards at once."""
    os.setpgid(0, 0)
    base, adapter = folder / "base", folder / "adapter"
    job = MergeJob(base, out, source=str(base), processes=2)
    job.merge_adapters([adapter_input(MergeableAdapter.open(adapter, job.tensors))])


def what_is_there(out: Path) -> str:
    """How far a killed merge was."""
    if out.exists():
        return "OUT, complete" + (" with leftovers" if making_folder(out).exists() else "")
    if not making_folder(out).exists():
        return "nothing yet"
    done = len(list(making_folder(out).glob("*.done.json")))
    return f"{done:2} shards done"


def content(folder: Path) -> str:
    """Hash of every file but the model card, which names the folder."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "README.md"]
    return fingerprint({path.name: file_hash(path) for path in paths})


if __name__ == "__main__":
    sys.exit(main())
