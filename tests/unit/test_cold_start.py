"""Imports of a rank before training; every start and restart pays for them."""

from __future__ import annotations

import json
import subprocess
import sys

# What some runs need, and what costs most of those that do not.
NOT_AT_START = ["datasets", "pandas", "matplotlib", "deepspeed", "trl", "sklearn"]
NOT_AT_START += ["torch._inductor.compile_fx", "dtrain.engines.fsdp2", "dtrain.samples.stdlib"]
PROGRAM = """
import gc, json, os, sys
from dtrain.core.lazy_import import import_fast
import_fast("dtrain.rank_main")
print(json.dumps([sorted(sys.modules), gc.isenabled(), os.environ.get("TORCHDYNAMO_DISABLE")]))
"""


def test_worker_imports_only_what_training_needs() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    modules, collects, compiler = json.loads(done.stdout.splitlines()[-1])
    assert "dtrain.training.trainer" in modules
    assert not set(NOT_AT_START) & set(modules)
    assert collects and compiler is None
