"""GPUs that the plan knows: memory, arithmetic and links, from their makers' data sheets."""

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
        memory_gib: memory in GiB by the data sheet, less the sixteenth that error correction takes
            of GDDR where it is on by default. The driver keeps some of it (`usable_bytes`).
        tflops: 10^12 operations a second, dense bfloat16 with float32 sums.
        memory_gb_s: bandwidth of its memory, in 10^9 bytes a second.
        link_gb_s: bandwidth to the other GPUs of a node in one direction, as collectives reach it.
        network_gb_s: its share of the node's network in one direction, which the plan assumes.
    """

    name: str
    memory_gib: float
    tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float

    @property
    def usable_bytes(self) -> float:
        """Memory that a process can use, without what the driver keeps."""
        return (self.memory_gib - DRIVER_GIB) * GIB

    @property
    def family(self) -> str:
        """The name without variant and memory, such as a100."""
        return self.name.split("-")[0]


DRIVER_GIB = 0.6
MEMORY_TOLERANCE = 0.1  # a driver reports a little less memory than the data sheet

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


def find_gpu(name: str) -> Gpu:
    """The GPU with a name; the memory may be left out if the table has only one size.

    Raises:
        UserError: the table has no such GPU; the message suggests similar names.
    """
    key = name.lower().replace("gb", "g").replace("_", "-").replace(" ", "-")
    key = key.removeprefix("nvidia-").removesuffix("-sxm")
    if key in GPUS:
        return GPUS[key]
    sizes = [gpu for gpu in GPUS if gpu.rpartition("-")[0] == key]
    if len(sizes) == 1:
        return GPUS[sizes[0]]
    close = sizes or get_close_matches(key, GPUS, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(GPUS)}"
    raise UserError("the plan does not know this GPU", where=f"GPU {name}", fix=hint)


def gpu_of_device(name: str, memory_bytes: int) -> Gpu:
    """The GPU that a driver reports under a name such as "NVIDIA A100-SXM4-80GB".

    A GPU that is not in the table gets its real memory and low values for the rest.
    """
    gpu = known_gpu(name, memory_bytes)
    return gpu or Gpu(name, memory_bytes / GIB + DRIVER_GIB, 100, 1000, 25, 3)


def known_gpu(name: str, memory_bytes: int) -> Gpu | None:
    """The table's GPU that a driver reports under a name; None if it has none."""
    flat = re.sub(r"[^a-z0-9]", "", name.lower())
    candidates = [
        gpu
        for gpu in GPUS.values()
        if gpu.family in flat
        and abs(gpu.memory_gib * GIB / memory_bytes - 1) < MEMORY_TOLERANCE
        and ("pcie" in gpu.name) <= ("pcie" in flat)
    ]
    return max(candidates, key=lambda gpu: len(gpu.name), default=None)
