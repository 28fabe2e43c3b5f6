"""What the plan knows of GPUs: memory, arithmetic, links; from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from dtrain.core.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        memory_gib: as its maker says, less the sixteenth that error correction takes of GDDR where
            it is on as delivered; the driver keeps some (`usable_bytes`).
        tflops: dense bfloat16 with float32 sums, without sparsity.
        memory_gb_s: bandwidth of its memory.
        link_gb_s: to the other GPUs of a node, one direction, as collectives reach it.
        network_gb_s: share of the node's network, one direction; an assumption about the cluster.
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float

    @property
    def usable_bytes(self) -> float:
        """What a process can get: less what the driver keeps and reports as missing."""
        return (self.memory_gib - DRIVER_GIB) * GIB


DRIVER_GIB = 0.6

_ROWS = (
    Gpu("a10-24g", 22.5, 125, 600, 25, 3),
    Gpu("a10g-24g", 22.5, 70, 600, 25, 3),
    Gpu("a30-24g", 24, 165, 933, 100, 3),
    Gpu("l4-24g", 22.5, 121, 300, 25, 3),
    Gpu("rtx3090-24g", 24, 71, 936, 12, 3),
    Gpu("rtx4090-24g", 24, 165, 1008, 12, 3),
    Gpu("rtx5090-32g", 32, 210, 1792, 25, 3),
    Gpu("a100-40g", 40, 312, 1555, 250, 25),
    Gpu("a6000-48g", 48, 155, 768, 25, 3),
    Gpu("rtx6000ada-48g", 48, 364, 960, 25, 3),
    Gpu("a40-48g", 45, 150, 696, 25, 12),
    Gpu("l40-48g", 45, 181, 864, 25, 12),
    Gpu("l40s-48g", 45, 362, 864, 25, 12),
    Gpu("a100-80g", 80, 312, 2039, 250, 25),
    Gpu("h100-80g", 80, 989, 3352, 400, 50),
    Gpu("h100-pcie-80g", 80, 756, 2000, 50, 25),
    Gpu("h100-96g", 96, 989, 3352, 400, 50),
    Gpu("h200-141g", 141, 989, 4800, 400, 50),
    Gpu("b200-180g", 180, 2250, 8000, 900, 50),
)
GPUS = {gpu.name: gpu for gpu in _ROWS}
DEFAULT = "h100-80g"


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; the memory may be left out where there is one size only.

    Raises:
        UserError: there is none; the nearest names are offered.
    """
    wanted = name.lower().replace("gb", "g").replace("_", "-").replace(" ", "-")
    wanted = wanted.removeprefix("nvidia-").removesuffix("-sxm")
    if wanted in GPUS:
        return GPUS[wanted]
    alike = [gpu for gpu in GPUS if gpu.rpartition("-")[0] == wanted]
    if len(alike) == 1:
        return GPUS[alike[0]]
    close = alike or get_close_matches(wanted, GPUS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(GPUS)}"
    raise UserError("the plan does not know this GPU", where=f"GPU {name}", fix=hint)


def gpu_of_device(name: str, memory_bytes: int) -> Gpu:
    """The GPU behind what a driver calls it, such as "NVIDIA A100-SXM4-80GB".

    One that is not in the table gets its true memory, and modest guesses for the rest.
    """
    flat = re.sub(r"[^a-z0-9]", "", name.lower())
    alike = [
        gpu
        for gpu in GPUS.values()
        if gpu.name.split("-")[0] in flat
        and abs(gpu.memory_gib * GIB / memory_bytes - 1) < MEMORY_TOLERANCE
        and ("pcie" in gpu.name) <= ("pcie" in flat)
    ]
    if alike:
        return max(alike, key=lambda gpu: len(gpu.name))
    return Gpu(name, memory_bytes / GIB + DRIVER_GIB, 100, 1000, 25, 3)


MEMORY_TOLERANCE = 0.1  # a driver reports a little less than the data sheet
