"""CPU of what a worker imports against that of TRL's trainer, in alternating runs.

`python tests/bench/cold_start.py [PAIRS]`
"""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median

WORKER = "from dtrain.core.imports import import_fast; import_fast('dtrain.worker')"
TRL = "from trl import SFTTrainer"


def cpu_seconds(program: str) -> float:
    """Of a Python that runs `program`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(pairs: int = 5) -> None:
    cpu_seconds(WORKER), cpu_seconds(TRL)  # from now on all of it lies in memory
    found = [(cpu_seconds(WORKER), cpu_seconds(TRL)) for _ in range(pairs)]
    worker, trl = (median(times) for times in zip(*found, strict=True))
    ratio = median(a / b for a, b in found)
    print(f"imports of a worker {worker:.2f} CPU s, of TRL's trainer {trl:.2f}: {ratio:.2f}x")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
