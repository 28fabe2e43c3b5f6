"""Cost of a merge: memory, bytes, and wall time against a copy of the same folder.

    python tests/bench/merge_cost.py [--gigabytes 1 4] [--rounds 3] [--rank 16] [--peft 1] [--cold]
        [--new-base]

Random bfloat16 models, sharded; a LoRA adapter on every linear layer. Merges and copies
(`cp`, then fsync of every file) take turns, and the ratio of each neighboring pair is kept; with
--cold the model is out of the page cache before each, as one that is larger than it. From the
second merge on the base's hashes are remembered; with --new-base they never are. Bytes read
are those beyond the imports and the adapter. For the sizes that --peft names, PEFT
(load, merge_and_unload, save_pretrained) is measured too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from merge_models import make_adapter, make_model

POLL_SECONDS = 0.004
SHARD_BYTES = 500_000_000
IMPORTS = (
    "import dtrain.cli, dtrain.merge.merge, dtrain.merge.provenance"  # read on top of the model
)
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


@dataclass
class Cost:
    """Wall and CPU seconds of a process, its peak anonymous bytes, and bytes read and written."""

    wall: float
    cpu: float
    anonymous: int
    read: int
    written: int


def main() -> None:
    """Generate, measure, print, remove."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peft", type=float, default=1.0)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--new-base", action="store_true")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    for gigabytes in arguments.gigabytes:
        folder = Path(tempfile.mkdtemp(prefix="dtrain-merge-cost-", dir=arguments.folder))
        try:
            measure(folder, gigabytes, arguments)
        finally:
            shutil.rmtree(folder)


def measure(folder: Path, gigabytes: float, arguments: argparse.Namespace) -> None:
    """All figures of one size."""
    size = make_model(folder / "base", gigabytes, SHARD_BYTES)
    make_adapter(folder / "adapter", gigabytes, arguments.rank)
    inputs = [str(folder / "base"), str(folder / "adapter")]
    command = [sys.executable, "-m", "dtrain", "merge", *inputs, str(folder / "out")]
    other_reads = watched([sys.executable, "-c", IMPORTS]).read
    other_reads += (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    merges, copies = [], []
    for _ in range(arguments.rounds):
        settle(folder / "base", arguments.cold)
        copies.append(copy(folder / "base", folder / "copy"))
        settle(folder / "base", arguments.cold)
        if arguments.new_base:
            for path in (folder / "base").iterdir():
                os.utime(path)
        merges.append(watched(command))
        shutil.rmtree(folder / "out")
    ratios = [m.wall / c for m, c in zip(merges, copies, strict=True)]
    how = "cold, " * arguments.cold + "new base, " * arguments.new_base
    print(
        f"{size / 1e9:.2f} GB, {len(list((folder / 'base').glob('*.safetensors')))} shards: "
        f"anonymous {max(m.anonymous for m in merges) / 1e6:.0f} MB, "
        f"read {(merges[0].read - other_reads) / size:.3f}x, "
        f"written {merges[0].written / size:.3f}x, "
        f"{how}wall {median(m.wall for m in merges):.1f} s "
        f"({median(m.cpu for m in merges):.1f} s CPU), "
        f"cp + fsync {median(copies):.1f} s, ratio {median(ratios):.2f} "
        f"({', '.join(f'{r:.2f}' for r in ratios)})",
        flush=True,
    )
    if gigabytes == arguments.peft:
        cost = watched([sys.executable, "-c", PEFT, *inputs, str(folder / "out")])
        print(
            f"    PEFT: anonymous {cost.anonymous / 1e6:.0f} MB, "
            f"wall {cost.wall:.1f} s ({cost.cpu:.1f} s CPU)",
            flush=True,
        )


def settle(folder: Path, cold: bool) -> None:
    """Flush all writes; drop the folder's files from the page cache, or load them into it."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            advice = os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_WILLNEED
            os.posix_fadvise(file.fileno(), 0, 0, advice)


def copy(source: Path, target: Path) -> float:
    """Seconds of a copy, until it is on disk."""
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def watched(command: list[str]) -> Cost:
    """Run a command, and sample its memory every few milliseconds."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anonymous, io = 0, {"rchar": 0, "wchar": 0}
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        anonymous = max(anonymous, fields(process.pid, "status").get("RssAnon", 0) * 1024)
        io |= fields(process.pid, "io")
        time.sleep(POLL_SECONDS)
    io |= fields(process.pid, "io")  # of the whole life, as it is not yet waited for
    wall = time.monotonic() - began
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return Cost(wall, used.ru_utime + used.ru_stime, anonymous, io["rchar"], io["wchar"])


def fields(process: int, file: str) -> dict[str, int]:
    """The numbers in a file of /proc."""
    try:
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return {}
    pairs = (line.split() for line in lines)
    return {p[0].rstrip(":"): int(p[1]) for p in pairs if len(p) > 1 and p[1].isdigit()}


if __name__ == "__main__":
    main()
