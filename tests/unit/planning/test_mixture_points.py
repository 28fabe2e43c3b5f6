"""The plan against published speed and memory of mixtures of experts (mixture_points.csv).

`python tests/unit/planning/test_mixture_points.py` prints a line for each row. The figures are of
other trainers: NeMo AutoModel with the experts divided among the ranks and balanced routers, and
prime-rl in the loop of reinforcement learning or fine-tuning.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dtrain.config.methods import Full, Lora
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import find_shape
from dtrain.planning.speed import Estimate, tokens_per_second
from dtrain.planning.workload import Cluster, Workload

POINTS = Path(__file__).with_name("mixture_points.csv")


class Point(NamedTuple):
    """A published figure and the plan's.

    Attributes:
        planned: tokens a second of all ranks.
        real: the same, published.
        planned_gib, real_gib: peak of a rank; the second is None where it was not published.
    """

    label: str
    planned: Estimate
    real: float
    planned_gib: float
    real_gib: float | None


def read_points(path: Path = POINTS) -> Iterator[Point]:
    """The rows of the file."""
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            workload, cluster = workload_of(row)
            yield Point(
                f"{row['model']} {row['method']} {row['ranks']} x {row['gpu']} "
                f"{row['sequence_length']} ({row['source'].split('/')[4]})",
                tokens_per_second(workload, cluster),
                float(row["tokens_per_s_per_gpu"]) * workload.ranks,
                build_engine_model(workload).peak_memory().peak / 2**30,
                float(row["peak_gib"]) if row["peak_gib"] else None,
            )


def workload_of(row: dict[str, str]) -> tuple[Workload, Cluster]:
    """The training of a row, as dtrain would do it under fsdp2."""
    ranks, shape = int(row["ranks"]), find_shape(row["model"])[0]
    method = Full(kind="full") if row["method"] == "full" else Lora(kind="lora", r=16)
    workload = Workload(
        shape=shape,
        method=method,
        engine="fsdp2",
        ranks=ranks,
        node_ranks=8,
        shard=ranks,
        element_bytes=2,
        sequence_length=int(row["sequence_length"]),
        micro_batch=int(row["micro_batch"]),
        accumulation=1,
        checkpointing=row["checkpointing"] == "True",
        kernels=shape.kernels,
    )
    return workload, Cluster(find_gpu(row["gpu"]), ranks // 8, 8)


def test_published_speeds_are_within_the_range_of_the_plan() -> None:
    """Except where the experts are divided among nodes, so that no weight crosses the network."""
    points = list(read_points())
    off = [p for p in points if not p.planned.low <= p.real <= p.planned.high]
    assert [p.label.split()[0] for p in off] == ["openai/gpt-oss-120b"]
    ratios = [p.real / p.planned.middle for p in points if p not in off]
    assert all(0.5 < ratio < 1.4 for ratio in ratios)


def main() -> None:
    """A line for each row."""
    for point in read_points():
        plan = point.planned
        line = f"{point.label:<64}{point.real:>9,.0f} tokens/s, plan {plan.middle:>9,.0f} "
        line += f"({plan.low:,.0f} to {plan.high:,.0f}), {point.real / plan.middle:.2f}x"
        if point.real_gib:
            line += f"; {point.real_gib:.1f} GiB, plan {point.planned_gib:.1f}"
        print(line)


if __name__ == "__main__":
    main()
