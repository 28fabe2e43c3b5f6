"""The plan's choices as a table.

After an intended change, `python tests/unit/planning/test_choose.py` rewrites the table; give
the reason in the commit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dtrain.config.methods import parse_method
from dtrain.core.units import duration, size
from dtrain.planning.choose import PlanOption, build_option, choose
from dtrain.planning.fit import FITS
from dtrain.planning.gpus import find_gpu
from dtrain.planning.kernel_table import KERNELS
from dtrain.planning.known_models import find_shape
from dtrain.planning.workload import Cluster, Workload

GOLDEN = Path(__file__).parents[2] / "golden" / "plan.txt"
BASES = {
    "13B": "meta-llama/Llama-2-13b",
    "34B": "codellama/CodeLlama-34b",
    "70B": "meta-llama/Llama-3.1-70B",
}
GPUS = ("rtx4090-24g", "l40s-48g", "h100-80g")
BILLION = 1e9
GLOBAL_BATCH = 128  # sequences of 2048 tokens


def build_case(base: str, method: str, cluster: Cluster) -> Workload:
    """A stage with r 16 on all linear layers, activations recomputed."""
    shape, _ = find_shape(base)
    return Workload(
        shape=shape,
        method=parse_method({"kind": method}),
        engine="ddp",
        ranks=cluster.ranks,
        node_ranks=cluster.gpus_per_node,
        shard=1,
        element_bytes=2,
        sequence_length=2048,
        micro_batch=1,
        accumulation=GLOBAL_BATCH // cluster.ranks,
        checkpointing=True,
        kernels=KERNELS[shape.kind],
    )


def lines() -> Iterator[str]:
    """The table; hours are for a billion tokens."""
    yield f"{'base':<5}{'GPU':<13}{'nodes':>5}  {'method':<7}{'engine':<11}{'micro':>5}" + (
        f"{'budget':>9}  {'verdict':<13}{'1B tokens':>12}"
    )
    for name, base in BASES.items():
        for gpu in GPUS:
            for nodes in (1, 2, 8):
                for method in ("lora", "qlora"):
                    cluster = Cluster(find_gpu(gpu), nodes, 8)
                    yield _line(name, method, cluster, _best(base, method, cluster))


def _best(base: str, method: str, cluster: Cluster) -> PlanOption:
    workload = build_case(base, method, cluster)
    return build_option(choose(workload, cluster, any_engine=True, any_micro=True), cluster)


def _line(name: str, method: str, cluster: Cluster, best: PlanOption) -> str:
    head = f"{name:<5}{cluster.gpu.name:<13}{cluster.nodes:>5}  {method:<7}{best.engine:<11}"
    verdict = f"{size(best.fit.budget):>9}  {best.fit.verdict:<13}"
    time = duration(BILLION / best.speed)
    return f"{head}{best.workload.micro_batch:>5}{verdict}{time:>12}"


def test_choices_match_the_golden_table() -> None:
    assert list(lines()) == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_no_fitting_option_beats_the_choice() -> None:
    """If ddp fits, it is not faster than the choice; a larger micro-batch needs more memory."""
    for base in BASES.values():
        for gpu in GPUS:
            cluster = Cluster(find_gpu(gpu), 2, 8)
            best = _best(base, "qlora", cluster)
            ddp = build_option(build_case(base, "qlora", cluster), cluster)
            if ddp.fit.verdict == FITS:
                assert best.fit.verdict == FITS and best.speed >= ddp.speed
            larger = replace(best.workload, micro_batch=2 * best.workload.micro_batch)
            assert build_option(larger, cluster).fit.budget > best.fit.budget


if __name__ == "__main__":
    os.environ["DTRAIN_CACHE"] = str(GOLDEN.parent)  # earlier runs must not correct the table
    GOLDEN.write_text("\n".join(lines()) + "\n", encoding="utf-8")
