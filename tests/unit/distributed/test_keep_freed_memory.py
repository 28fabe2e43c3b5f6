"""What a rank frees it gets again without asking the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A process of its own: the setting is for good.
PROGRAM = """
import resource, sys, torch
from dtrain.distributed.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def gather():
    torch.full((50_000_000,), 1.0)  # 200 MB: ZeRO-3's bucket
gather()
before = faults()
gather()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_the_second_large_block_costs_no_page_faults() -> None:
    kept, given_back = (faults(word) for word in ("keep", "plain"))
    assert kept < 100
    assert given_back > 10_000  # or nothing needs to be kept any more


def faults(word: str) -> int:
    command = [sys.executable, "-c", PROGRAM, word]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
