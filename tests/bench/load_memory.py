"""Cost of loading a base: host memory of a rank, and bytes that a node reads.

    python tests/bench/load_memory.py [--gigabytes 1] [--ranks 2 4]
        [--kinds fsdp2 zero3 nf4 plain plain-nf4]

A random bfloat16 model, not in the page cache at each start. `plain` is transformers'
from_pretrained on every rank, each parameter then read once, since it only maps the files;
`plain-nf4` the same in 4 bits; `nf4` is ddp over a base in 4 bits. Memory is anonymous, over that
of the imports; bytes are those that the ranks' reads brought from the disk, all ranks together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from merge_cost import fields
from merge_models import layer_shapes, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from dtrain.config.engines import ENGINES
from dtrain.config.load import load_recipe
from dtrain.distributed.world import end_world, start_world
from dtrain.engines.base import build_engine
from dtrain.methods.base import build_method
from dtrain.models.load import load_base
from dtrain.models.quantize import nf4_config
from dtrain.models.sharded_loading import stream_base

ALLOWED_BYTES = 300_000_000
KINDS = ["fsdp2", "zero3", "nf4", "plain", "plain-nf4"]


def main() -> None:
    """Start ranks of each kind; print their reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rank", nargs=2)
    arguments = parser.parse_args()
    if arguments.rank:
        return rank(Path(arguments.rank[0]), arguments.rank[1])
    folder = Path(tempfile.mkdtemp(prefix="dtrain-load-"))
    size = make_model(folder / "base", arguments.gigabytes, 400_000_000)
    whole = json.loads((folder / "base" / "config.json").read_text())
    layer = 2 * sum(a * b for a, b in layer_shapes(whole).values())
    print(f"{size / 1e9:.2f} GB, a layer {layer / 1e6:.0f} MB")
    try:
        for ranks in arguments.ranks:
            for kind in arguments.kinds:
                reports = start(folder / "base", kind, ranks)
                print_result(kind, ranks, size, layer, reports)
    finally:
        shutil.rmtree(folder)


def print_result(
    kind: str, ranks: int, size: int, layer: int, reports: list[dict[str, float]]
) -> None:
    """One line: the worst rank's memory against what it keeps, and the node's bytes."""
    worst = max(reports, key=lambda report: report["peak"] - report["kept"])
    over = worst["peak"] - worst["kept"] - layer
    read = sum(report["read"] for report in reports)
    print(
        f"{kind:9} {ranks} ranks: keeps {worst['kept'] / 1e6:.0f} MB, peak "
        f"{worst['peak'] / 1e6:.0f} MB, over share and a layer {over / 1e6:.0f} MB "
        f"({'within' if over <= ALLOWED_BYTES else 'above'} 300); "
        f"node reads {read / size:.2f}x; {max(report['seconds'] for report in reports):.1f} s",
        flush=True,
    )


def start(base: Path, kind: str, ranks: int) -> list[dict[str, float]]:
    """Drop the files from the page cache, start the ranks, and collect their reports."""
    for path in base.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "dtrain.torchrun", "--standalone"]
    command += [f"--nproc-per-node={ranks}", __file__, "--rank", str(base), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert len(lines) == ranks, done.stderr[-2000:]
    return [json.loads(line.removeprefix("REPORT ")) for line in lines]


def rank(base: Path, kind: str) -> None:
    """Load, and print the cost."""
    world = start_world("cpu")
    watch = Peak()
    world.barrier()
    before, began = fields(os.getpid(), "io")["read_bytes"], time.monotonic()
    watch.start()
    model = load(base, kind, world)
    seconds = time.monotonic() - began
    read = fields(os.getpid(), "io")["read_bytes"] - before
    kept = anonymous() - watch.imports
    world.barrier()
    watch.over = True
    report = {"peak": watch.peak - watch.imports, "kept": kept, "read": read, "seconds": seconds}
    os.write(1, f"REPORT {json.dumps(report)}\n".encode())  # at once: print may write the end apart
    world.barrier()
    del model
    end_world()


def load(base: Path, kind: str, world: Any) -> object:
    """The model as its engine holds it; what is returned keeps it alive."""
    if kind.startswith("plain"):
        packing = nf4_config(torch.bfloat16) if kind == "plain-nf4" else None
        plain: nn.Module = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=packing
        )
        for parameter in plain.parameters():
            parameter.view(torch.uint8).amax()
        return plain
    engine = "ddp" if kind == "nf4" else kind
    method = "qlora" if kind == "nf4" else "lora"
    changes = [f"model.base={base}", "model.dtype=bfloat16", f"engine.kind={engine}"]
    changes += [f"stages.domain.method.kind={method}", f"launch.processes={world.size}"]
    recipe = load_recipe("tiny", changes)
    stage = recipe.stages[0]
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "device": world.device}
    settings["quantized"] = method == "qlora"
    materialize: Any = lambda block: None  # noqa: E731
    if ENGINES[engine].shards_base:
        streamed = stream_base(base, recipe.model, **settings)
        model: nn.Module = streamed.model
        materialize = streamed.materialize
    else:
        model = load_base(base, recipe.model, **settings)
    adapted = build_method(stage.method).attach(model, seed=0, device=world.device)  # type: ignore[arg-type]
    return build_engine(adapted, recipe, stage, world, materialize), model


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    return fields(os.getpid(), "status")["RssAnon"] * 1024


class Peak(threading.Thread):
    """Samples this process's memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.imports = self.peak = anonymous()
        self.over = False

    def run(self) -> None:
        """Sample until stopped."""
        while not self.over:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.005)


if __name__ == "__main__":
    main()
