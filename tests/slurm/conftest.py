"""A real Slurm for the tests of this folder, started and ended with them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cluster.py

from cluster import Cluster, reason_to_skip

NODES = 5


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Five nodes with eight pretended GPUs each; training is on the CPU."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), NODES)
    cache = os.environ.get("DTRAIN_CACHE") or str(tmp_path_factory.mktemp("cache"))
    cluster.environment = {
        "DTRAIN_ENV": sys.prefix,
        "DTRAIN_CACHE": cache,
        "DTRAIN_PREFLIGHT": "off",
        "OMP_NUM_THREADS": "1",
    }
    yield cluster
    cluster.close()


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Callable[..., str]:
    """Submit a script of slurm/ that trains `tiny`: `submit(script, options, keys)`."""

    def run(script: str, options: list[str], keys: list[str], **environ: str) -> str:
        log = f"--output={tmp_path}/job-%j.log"
        small = ["device=cpu", "evaluation.generation={}"]
        environ = {"DTRAIN_RECIPE": "tiny", **environ}
        return cluster.sbatch(log, *options, f"slurm/{script}.sh", *small, *keys, **environ)

    return run
