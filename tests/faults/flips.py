"""Bit flips and truncations in every type of file of a run: all are detected before use, by name.

    python tests/faults/flips.py [--flips 300] [--cuts 100] [--seed S]

After a `tiny` run each type of its files is damaged at random positions and checked by the
functions that a start calls before it uses the file. The exit status is 1 if damage is not
detected, is reported without the file's name, or hides an earlier intact checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from starts import OVERRIDES, Start

from dtrain.checkpoints import newest_complete
from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed
from dtrain.data.store import Store
from dtrain.pipeline.stage_record import StageRecord

Look = Callable[[Path], str]  # the report about a damaged file; empty if nothing was detected


def main() -> int:
    """Damage files, check them, count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--cuts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="dtrain-flips-"))
    os.environ["DTRAIN_CACHE"] = str(folder / "cache")
    start = Start(folder / "run", [*OVERRIDES, "engine.kind=zero3"])  # both ranks write a shard
    assert start.end(600) == 0, start.log.read_text()
    draw = random.Random(arguments.seed)
    missed = 0
    for title, files, look in kinds(folder):
        assert files and not any(look(file) for file in files), title  # no report without damage
        flips = sum(
            is_detected(draw.choice(files), look, flip, draw) for _ in range(arguments.flips)
        )
        cuts = sum(is_detected(draw.choice(files), look, cut, draw) for _ in range(arguments.cuts))
        missed += arguments.flips + arguments.cuts - flips - cuts
        print(
            f"{title:<20} {len(files):>2} files: {flips} of {arguments.flips} flips, "
            f"{cuts} of {arguments.cuts} truncations detected by name"
        )
    print(f"{missed} missed")
    return 1 if missed else 0


def kinds(folder: Path) -> list[tuple[str, list[Path], Look]]:
    """Each type of file: its files, and the check that a start makes."""
    run, stage = folder / "run", folder / "run/domain"
    checkpoints = stage / "checkpoints"
    newest = sorted(checkpoints.glob("step-*"))[-1]
    results = StageRecord(stage, read_sealed(stage / "stage.json")["inputs"])
    stores = sorted((folder / "cache/stores").glob("*"))
    assert len(list(checkpoints.glob("step-*"))) > 1, "no earlier checkpoint to fall back to"

    def at_checkpoint(file: Path) -> str:
        best, reasons = newest_complete(checkpoints)
        assert best is not None
        return "" if best.folder == newest else "; ".join(reasons)

    def at_store(file: Path) -> str:
        try:
            Store(file.parent).verify()
        except UserError as error:
            return str(error)
        return ""

    def at_results(file: Path) -> str:
        return results.find_corruption(with_merged=True)

    def at_record(file: Path) -> str:
        return "" if results.is_complete() else f"{file} is damaged"

    return [
        ("checkpoint shard", sorted(newest.glob("*.safetensors")), at_checkpoint),
        ("checkpoint manifest", [newest / "manifest.json"], at_checkpoint),
        ("data store", [f for s in stores for f in files_of(s)], at_store),
        ("adapter", files_of(results.adapter), at_results),
        ("merged model", files_of(results.merged), at_results),
        ("stage record", [run / "domain/stage.json"], at_record),
    ]


def files_of(folder: Path) -> list[Path]:
    """Its non-empty files, without the lock."""
    return sorted(p for p in folder.iterdir() if p.name != ".lock" and p.stat().st_size)


def is_detected(
    file: Path, look: Look, damage: Callable[[bytearray, random.Random], None], draw: random.Random
) -> bool:
    """Damage a file, check it, restore it; return whether the report names it."""
    before, times = file.read_bytes(), file.stat()
    content = bytearray(before)
    damage(content, draw)
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    said = look(file)
    file.write_bytes(before)
    if file.name not in said:
        print(f"missed: {damage.__name__} in {file}: {said!r}")
    return file.name in said


def flip(content: bytearray, draw: random.Random) -> None:
    """Flip one bit."""
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def cut(content: bytearray, draw: random.Random) -> None:
    """Cut off the end."""
    del content[draw.randrange(len(content)) :]


if __name__ == "__main__":
    sys.exit(main())
