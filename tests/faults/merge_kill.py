"""kill -9 at random moments of a merge: the next call finishes it, with the same bytes.

    python tests/faults/merge_kill.py [--kills 50] [--seed 0] [--megabytes 60]

A merge is killed at a random byte of what it writes, until so many kills have been done; every
third is killed once more as it goes on. Processes are forked from one that has imported
everything, so that the moments fall into the merge; the last five are started as a user does.
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

COMMANDS = 5  # started as a user does


def main() -> int:
    """Kill; 0 if every merge that was killed ended with the bytes of one that was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=60)
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="dtrain-merge-kill-"))
    size = arguments.megabytes / 1000
    made = make_model(place / "base", size, shard_bytes=int(size * 1e8))
    make_adapter(place / "adapter", size)
    assert run(place, place / "whole") == 0
    wanted = content(place / "whole")
    shards = len(list((place / "base").glob("*.safetensors")))
    print(f"{made / 1e6:.0f} MB in {shards} shards; undisturbed: {wanted[:16]}")
    status = kills(place, wanted, made, arguments.kills, random.Random(arguments.seed))
    shutil.rmtree(place)
    return status


def kills(place: Path, wanted: str, made: int, count: int, draw: random.Random) -> int:
    """Kill so often; print what each kill found."""
    found, wrong, done = Counter[str](), 0, 0
    while done < count:
        out = place / f"out-{done}"
        as_user = done >= count - COMMANDS
        for _ in range(2 if done % 3 == 2 and done + 2 <= count else 1):
            kill(place, out, draw.uniform(0, 1.02) * made, draw.uniform(0, 0.05), as_user)
            found[what_is_there(out)] += 1
            done += 1
        if problem := after(place, out, wanted):
            print(f"{out}: {problem}")
            wrong += 1
        else:
            shutil.rmtree(out)
    for state, number in sorted(found.items()):
        print(f"{number:4} kills found {state}")
    print(f"{done} kills, {wrong} merges that did not end as an undisturbed one")
    return 1 if wrong else 0


def after(place: Path, out: Path, wanted: str) -> str:
    """What is wrong once the next call has ended; empty if it is as it should be."""
    if status := run(place, out):
        return f"exit status {status}"
    if content(out) != wanted:
        whole = {path.name: file_hash(path) for path in (place / "whole").iterdir()}
        found = {path.name: file_hash(path) for path in out.iterdir()}
        return f"differs in {sorted(n for n, _ in whole.items() ^ found.items())}"
    return "leftovers" if making_folder(out).exists() else ""


def kill(place: Path, out: Path, moment: float, more: float, as_user: bool) -> None:
    """Start a merge, and kill it some seconds after it has written so many bytes."""
    if as_user:
        command = ["merge", place / "base", place / "adapter", out]
        process = subprocess.Popen(
            [sys.executable, "-m", "dtrain", *command], stdout=subprocess.DEVNULL
        )
        wait(out, moment, lambda: process.poll() is None)
        time.sleep(more)
        process.kill()
        process.wait()
        return
    forked = multiprocessing.get_context("fork").Process(target=one, args=(place, out))
    forked.start()
    wait(out, moment, forked.is_alive)
    time.sleep(more)
    forked.kill()
    forked.join()


def wait(out: Path, moment: float, alive: Callable[[], bool]) -> None:
    """Until so many bytes are there, or the merge is over."""
    while alive() and not out.exists() and written(out) < moment:
        time.sleep(0.002)


def written(out: Path) -> int:
    """Bytes of shards that are there, whole or not; -1 before there is a folder."""
    total = -1
    with suppress(FileNotFoundError):
        for entry in os.scandir(making_folder(out) / MODEL):
            total += entry.stat().st_size
    return total


def run(place: Path, out: Path) -> int | None:
    """A merge that nobody kills, in a process of its own: its exit status."""
    process = multiprocessing.get_context("fork").Process(target=one, args=(place, out))
    process.start()
    process.join()
    return process.exitcode


def one(place: Path, out: Path) -> None:
    """The merge; two shards at once."""
    os.setpgid(0, 0)
    base, adapter = place / "base", place / "adapter"
    job = MergeJob(base, out, source=str(base), processes=2)
    job.merge_adapters([adapter_input(MergeableAdapter.open(adapter, job.tensors))])


def what_is_there(out: Path) -> str:
    """How far it was."""
    if out.exists():
        return "OUT, complete" + (" with leftovers" if making_folder(out).exists() else "")
    if not making_folder(out).exists():
        return "nothing yet"
    done = len(list(making_folder(out).glob("*.done.json")))
    return f"{done:2} shards done"


def content(folder: Path) -> str:
    """Hash of every file."""
    return fingerprint({path.name: file_hash(path) for path in sorted(folder.iterdir())})


if __name__ == "__main__":
    sys.exit(main())
