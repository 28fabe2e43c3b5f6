"""`dtrain plan` against published figures: memory and speed, each source in turn left out.

    python tests/bench/plan_points.py FOLDER      # memory_points.csv, throughput_points.csv

The trainers of those figures compute differently from dtrain (logits of all tokens, adapters in 16
bits, ...). `plan_trainers.py` describes each according to its code, which was read again after the
first errors. The allocator's factor and the utilization of a GPU are fitted, for each
source only to the others.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from plan_trainers import Trainer, tensors, trainer_of

from dtrain.config.methods import Full, Lora, MethodSettings
from dtrain.planning.architectures import shape_of
from dtrain.planning.fit import BUDGET_BYTES, BUDGET_FACTOR, LOWER_BYTES, LOWER_FACTOR
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import KNOWN, ModelSizes
from dtrain.planning.shapes import LinearShape, ModelShape
from dtrain.planning.speed import Estimate, flops_per_token, tokens_per_second
from dtrain.planning.workload import Cluster, Workload

GB, GIB = 1e9, 2**30
MODELS = {
    "llama2-7b": "meta-llama/Llama-2-7b",
    "llama2-13b": "meta-llama/Llama-2-13b",
    "llama2-70b": "meta-llama/Llama-2-70b",
    "llama3-8b": "meta-llama/Llama-3.1-8B",
    "llama3-70b": "meta-llama/Llama-3.1-70B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "yi-34b": "01-ai/Yi-34B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
}
OTHERS = {
    "qwen1-7b": ModelSizes("qwen2", 32, 4096, 32, 32, 11008, 151936),
    "qwen1-14b": ModelSizes("qwen2", 40, 5120, 40, 40, 13696, 152064),
    "qwen1-72b": ModelSizes("qwen2", 80, 8192, 64, 64, 24576, 152064),
    # Two matrices of width 4h instead of three: the same arithmetic as 8/3 h.
    "mpt-7b": ModelSizes("llama", 32, 4096, 32, 32, 10923, 50432, True),
    "mpt-13b": ModelSizes("llama", 40, 5120, 40, 40, 13653, 50432, True),
    "mpt-70b": ModelSizes("llama", 80, 8192, 64, 64, 21845, 50432, True),
}


# Rows that are known to be wrong or not modeled, with the reason.
DOUBTFUL = {
    "LongLoRA": "second hand",
    "May 2024": "unpacked: shorter than stated",
    "405b": "batch size ambiguous",
    "dlrover": "11 GiB unexplained at its source",
    "torchtitan": "selective recomputation, or 8 bits",
    "fp32 base": "base in float32",
    "fp8": "8 bits",
    "seq not stated": "length of the rows not stated",
    "A6000": "143 % of the card's peak at its source",
    "axolotl": "offload",
}


def shape_named(name: str) -> ModelShape:
    row = OTHERS.get(name) or KNOWN[MODELS[name]]
    shape = shape_of({k: v for k, v in row._asdict().items() if v is not None}, name)
    return fused(shape) if name.startswith("qwen1") else shape


def fused(shape: ModelShape) -> ModelShape:
    """One matrix and one adapter for queries, keys and values, as in Qwen's first model."""
    qkv = LinearShape("self_attn.c_attn", shape.hidden, shape.q + 2 * shape.kv, True)
    return replace(shape, linears=(qkv, *shape.linears[3:]))


def sequences_in_epochs(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reason_against(row: dict[str, str]) -> str:
    text = " ".join(row.values())
    if row.get("offload") or "offload" in text:
        return "offload"
    if row.get("grad_ckpt") in ("selective", "sel"):
        return "selective recomputation, or 8 bits"
    return next((why for word, why in DOUBTFUL.items() if word in text), "")


def method_of(kind: str, trainer: Trainer) -> MethodSettings:
    if kind == "full":
        return Full(kind="full")
    targets = trainer.target_modules
    return Lora(
        kind=kind,
        r=trainer.rank,
        dropout=0.05 * trainer.has_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def workload_of_row(row: dict[str, str], trainer: Trainer) -> Workload:
    engine, ranks = row["engine"], int(row["gpus"])
    kind = {"single": "ddp", "fsdp1": "fsdp2"}.get(engine, engine)
    if kind not in ("ddp", "fsdp2", "zero2", "zero3"):
        kind = "fsdp2"
    return Workload(
        shape=shape_named(row["model"]),
        method=method_of(row["method"], trainer),
        engine=kind,
        ranks=ranks,
        node_ranks=min(ranks, 8),
        shard=1 if kind in ("ddp", "zero2") else ranks,
        element_bytes=2,
        sequence_length=int(row["seq_len"]),
        micro_batch=int(row["micro_batch"]),
        accumulation=1,
        checkpointing=row["grad_ckpt"] == "True",
        optimizer="adamw_8bit" if "8bit" in row.get("optimizer", "") else "adamw",
        uses_autocast=trainer.casts,
        kernels=trainer.kernels,
        on_gpu=not trainer.fused,
    )


ALLOCATED, RESERVED, PROCESS, CAPACITY = "allocated", "reserved", "process", "capacity"


def what_of(row: dict[str, str]) -> str:
    """What a figure counts: tensors, what torch's allocator holds, or all that a driver sees."""
    text = row["measured_what"]
    if "capacity" in text:
        return CAPACITY
    if "process" in text:
        return PROCESS
    return ALLOCATED if "allocated" in text or "active" in text else RESERVED


@dataclass(frozen=True)
class Point:
    source: str
    label: str
    planned: float
    real: float
    quantity: str

    def guess(self, factor: float, extra: float) -> float:
        """The predicted figure; a driver also counts the CUDA context."""
        if self.quantity == ALLOCATED:
            return self.planned
        return factor * self.planned + extra + least_beside(self)


def short(source: str) -> str:
    return source.split()[0].split("@")[0].removeprefix("github:")[:32]


def memory_points(path: Path) -> tuple[list[Point], dict[str, int]]:
    points, left_out = [], {}
    for row in sequences_in_epochs(path):
        trainer = trainer_of(row)
        why = reason_against(row) or ("" if trainer else "trainer not known")
        if why or trainer is None:
            left_out[why] = left_out.get(why, 0) + 1
            continue
        unit = GIB if "GiB" in row["measured_what"] else GB
        label = f"{row['model']} {row['method']} {row['engine']} {row['gpus']}x{row['seq_len']}"
        peak = tensors(workload_of_row(row, trainer), trainer)
        quantity = what_of(row)
        real = float(row["measured_peak_gb"]) * (GIB if quantity == CAPACITY else unit)
        points.append(Point(short(row["source"]), label, peak, real, quantity))
    return points, left_out


def fitted(points: list[Point]) -> tuple[float, float]:
    """The factor and the bytes, of tensors, that make the least median error."""
    peaks = [p for p in points if p.quantity in (RESERVED, PROCESS)]
    tries = [(0.90 + 0.01 * a, 0.1 * GB * b) for a in range(41) for b in range(41)]
    return min(tries, key=lambda t: median(abs(p.guess(*t) / p.real - 1) for p in peaks))


def covering(points: list[Point]) -> float:
    """The factor that covers every point, together with the budget's bytes."""
    return max((p.real - BUDGET_BYTES) / p.planned for p in points if p.quantity != CAPACITY)


def print_memory(points: list[Point]) -> None:
    """Leave one source out: its factor and bytes are fitted to the other sources."""
    print(f"\n{'memory, source left out':<36}{'rows':>5}{'factor':>8}{'+ GB':>6}", end="")
    print(f"{'median':>9}{'bias':>8}{'budget x':>10}{'covers':>8}{'plan':>7}")
    errors, fair, ours = [], [], []
    for source in sorted({p.source for p in points}):
        mine = [p for p in points if p.source == source and p.quantity != CAPACITY]
        if not mine:
            continue
        other_points = [p for p in points if p.source != source]
        (factor, extra), cover = fitted(other_points), covering(other_points)
        off = [p.guess(factor, extra) / p.real - 1 for p in mine]
        covered = [p.real <= cover * p.planned + BUDGET_BYTES for p in mine]
        planned = [p.real <= BUDGET_FACTOR * p.planned + BUDGET_BYTES for p in mine]
        errors, fair, ours = errors + [abs(x) for x in off], fair + covered, ours + planned
        line = f"{source:<36}{len(mine):>5}{factor:>8.2f}{extra / GB:>6.1f}"
        line += f"{median(abs(x) for x in off):>9.1%}{median(off):>8.1%}{cover:>10.2f}"
        print(f"{line}{sum(covered):>8}{sum(planned):>7}")
    print(f"{len(errors)} rows: median {median(errors):.1%}, worst {max(errors):.1%}", end="; ")
    print(f"budgets of the others cover {sum(fair)}, the plan's {sum(ours)}")
    peaks = [p for p in points if p.quantity != CAPACITY]
    least = sum(p.real >= LOWER_FACTOR * p.planned + least_beside(p) for p in peaks)
    print(f"the plan's `at least` is below {least} of them")
    roomy = [p for p in points if p.quantity == CAPACITY]
    print(f"longest rows that fit: tensors below capacity in {sum(map(below, roomy))}", end=" ")
    print(f"of {len(roomy)}, at {median(p.planned / p.real for p in roomy):.0%} of it")


def least_beside(point: Point) -> float:
    """Bytes of the CUDA context, where the figure includes it."""
    return LOWER_BYTES if point.quantity == PROCESS else 0.0


def below(point: Point) -> bool:
    return point.planned < point.real


@dataclass(frozen=True)
class Rate:
    """A published speed.

    Attributes:
        share: of the GPU's arithmetic that was reached.
        planned: tokens a second of all ranks, as the plan says.
        real: the same, published.
    """

    source: str
    family: str
    label: str
    share: float
    planned: Estimate
    real: float


def speed_points(path: Path) -> tuple[list[Rate], dict[str, int]]:
    points, left_out = [], {}
    for row in sequences_in_epochs(path):
        if row["model"] not in MODELS and row["model"] not in OTHERS:
            left_out["model not known"] = left_out.get("model not known", 0) + 1
            continue
        family = row["gpu_type"].lower()
        why = reason_against(row) or ("8 bits" if row["precision"] == "fp8" else "")
        if why:
            left_out[why] = left_out.get(why, 0) + 1
            continue
        workload = workload_of_row(row, trainer_of(row) or Trainer(()))
        gpu = find_gpu({"a100": "a100-80g", "h100": "h100-80g"}.get(family, family))
        rate = float(row["tokens_per_s_per_gpu"])
        share = flops_per_token(replace(workload, ranks=1)) * rate / (gpu.tflops * 1e12)
        label = f"{row['model']} {row['method']} {row['engine']}"
        planned = tokens_per_second(
            workload, Cluster(gpu, workload.ranks // workload.node_ranks, workload.node_ranks)
        )
        source, real = short(row["source"]), rate * workload.ranks
        points.append(Rate(source, family, label, share, planned, real))
    return points, left_out


def print_speed(points: list[Rate]) -> None:
    print(f"\n{'speed, source left out':<36}{'rows':>5}{'median':>9}{'worst':>8}")
    errors = []
    for source in sorted({p.source for p in points}):
        other_points = [p for p in points if p.source != source]
        off = []
        for point in (p for p in points if p.source == source):
            like = [p.share for p in other_points if p.family == point.family]
            guess = median(like or [p.share for p in other_points])
            off.append((abs(guess / point.share - 1), point.label))
        errors += off
        middle, worst = median(x for x, _ in off), max(off)
        print(f"{source:<36}{len(off):>5}{middle:>9.1%}{worst[0]:>8.1%}  {worst[1]}")
    print(f"median of {len(errors)} rows {median(x for x, _ in errors):.1%}; worst {max(errors)}")
    print(f"\n{'share of the data sheet':<24}{'rows':>5}{'low':>8}{'median':>8}{'high':>8}")
    for family in sorted({p.family for p in points}):
        shares = sorted(p.share for p in points if p.family == family)
        low, high = shares[0], shares[-1 - len(shares) // 6]
        print(f"{family:<24}{len(shares):>5}{low:>8.2f}{median(shares):>8.2f}{high:>8.2f}")


def print_ranges(points: list[Rate]) -> None:
    """The plan as it stands, with sending: its shares are of these very points."""
    off = [p.real / p.planned.middle - 1 for p in points]
    inside = sum(p.planned.low <= p.real <= p.planned.high for p in points)
    beyond = [p.real / p.planned.high - 1 for p in points if p.real > p.planned.high]
    below = [p.real / p.planned.low - 1 for p in points if p.real < p.planned.low]
    print(
        f"\nthe plan's own: median {median(map(abs, off)):.1%}; {inside} within its range", end=""
    )
    print(f"; above it {[f'{x:.1%}' for x in beyond]}, below {[f'{x:.1%}' for x in below]}")


def compare(
    path: Path, read: Callable[[Path], tuple[list, dict[str, int]]], say: Callable[[list], None]
) -> None:
    points, left_out = read(path)
    print(f"{path.name}: {len(points)} rows; left out: {left_out}")
    say(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", action="store_true", help="every row of memory")
    arguments = parser.parse_args()
    compare(arguments.folder / "memory_points.csv", memory_points, print_memory)
    if arguments.rows:
        for p in memory_points(arguments.folder / "memory_points.csv")[0]:
            ratio = p.real / p.planned
            print(
                f"{p.source:<34}{p.label:<34}{p.planned / GB:>7.1f}{p.real / GB:>7.1f}{ratio:>7.2f}"
            )
    compare(arguments.folder / "throughput_points.csv", speed_points, print_speed)
    print_ranges(speed_points(arguments.folder / "throughput_points.csv")[0])


if __name__ == "__main__":
    main()
