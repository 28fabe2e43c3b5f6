"""One run of dtrain for step_speed.py: the worker itself, with a record of each step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from step_speed import Found, add, finish

from dtrain.core.lazy_import import import_fast

import_fast("dtrain.rank_main")
from dtrain import train  # noqa: E402
from dtrain.models import dora  # noqa: E402
from dtrain.training import trainer  # noqa: E402

REPEATS = 7


def main(job: Found) -> None:
    marks: list[Found] = []
    plain = trainer.train_step

    def record_step(tokens: int) -> None:
        marks.append({"cpu": time.process_time(), "wall": time.perf_counter(), "tokens": tokens})

    def train_step(inputs: Any, step: int, rate: float, **more: Any) -> Any:
        record_step(inputs.loader.counts(step).tokens)
        if step == job["steps"] + 1:
            finish(job, marks)
            first = min(1, job["steps"])  # that is measured
            spent = marks[-1]["cpu"] - marks[first]["cpu"]
            add(job, bound=least_seconds(inputs, range(first, step)) / spent)
            sys.exit(0)
        return plain(inputs, step, rate, **more)

    trainer.train_step = train_step
    if job["name"] == "peft":
        use_pefts_dora()
    status = train.main([recipe(job)])
    assert Path(job["result"]).exists(), status


class PeftsMagnitude(DoraLinearLayer):
    """PEFT's DoRA layer, with the interface of dtrain's."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(fan_in_fan_out=False)
        self.weight = torch.nn.Parameter(torch.ones(rows, device=device))
        self.base_squares: torch.Tensor | None = None

    @torch.no_grad()
    def measure(self, matrix: torch.Tensor, layer: str) -> None:
        self.base_squares = torch.linalg.norm(matrix, dim=1).square()
        self.weight.copy_(self.base_squares.sqrt())


def use_pefts_dora() -> None:
    """Compute DoRA layers as PEFT does; the kernel does not know them then."""
    dora.Magnitude, dora.DoraVariant = PeftsMagnitude, DoraLinearVariant


def least_seconds(inputs: Any, steps: range) -> float:
    """CPU seconds of the matrix products that no implementation can leave out, at their best rate.

    Each weight meets each token once forward and once backward, and once more if it trains; the
    output matrix meets the targets only; attention looks back inside its document.
    """
    model, config = inputs.engine.module, inputs.engine.module.config
    trains = model.get_output_embeddings().weight.requires_grad
    batches = [next(iter(inputs.loader.micro_batches(step, 0, 1, 1))) for step in steps]
    inner = [m for n, m in model.named_modules() if is_inner(n, m)]
    shapes = [(m.out_features, m.in_features) for m in inner]
    times = 3 if trains else 2
    head = model.get_output_embeddings().weight.shape
    total = 0.0
    for batch in batches:
        inputs.callbacks.pre_micro_batch(0, 0, 0)  # or many steps look like a hang
        tokens = batch.input_ids.shape[1]
        seconds_by_shape = {shape: product_seconds(tokens, *shape) for shape in set(shapes)}
        total += times * sum(seconds_by_shape[shape] for shape in shapes)
        total += times * product_seconds(len(batch.targets), *head)
        rate = max(2 * tokens * o * i / seconds for (o, i), seconds in seconds_by_shape.items())
        squares = sum(n * n for n in batch.document_lengths)
        total += 3 * 2 * squares * config.hidden_size * config.num_hidden_layers / rate
    return total


def is_inner(name: str, module: Any) -> bool:
    """A linear layer of the base, but the output matrix."""
    return isinstance(module, torch.nn.Linear) and "lora" not in name and "lm_head" not in name


def product_seconds(tokens: int, out: int, width: int) -> float:
    """CPU seconds of [tokens, width] x [width, out], the best of some, by MKL or oneDNN."""
    x, weight, y = torch.randn(tokens, width), torch.randn(out, width), torch.empty(tokens, out)
    functions = [lambda: torch.mm(x, weight.t(), out=y)]
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        functions.append(lambda: onednn(x, weight, None, "none", [], ""))
    best = float("inf")
    for function in functions * REPEATS:
        started = time.process_time()
        function()
        best = min(best, time.process_time() - started)
    return best


def recipe(job: Found) -> str:
    """A recipe of one stage."""
    method = {"kind": job["method"]}
    if job["method"] != "full":
        method |= {"r": 16, "dropout": job["dropout"]}
    formats = {"sft": "alpaca", "cpt": "text", "dpo": "preference"}
    source = {"path": job["data"], "format": formats[job["kind"]]}
    stage: Found = {
        "name": "stage", "kind": job["kind"], "method": method,
        "data": {"sequence_length": job["tokens"], "sources": [source]},
        "train": {"global_batch_size": 1, "steps": job["steps"] + 2, "learning_rate": 1e-4},
    }  # fmt: skip
    if job["kind"] == "dpo":
        stage["preference"] = {"precompute_reference": True}
    kernels = "off" if job["name"] == "plain" else "auto"
    model = {"base": "dtrain:smollm2-135m", "dtype": "float32", "kernels": kernels}
    model |= {"gradient_checkpointing": job["checkpointing"]}
    whole = {
        "name": "bench", "device": "cpu", "model": model, "stages": [stage],
        "output": {"folder": job["folder"] + "/run", "merge": False},
    }  # fmt: skip
    path = Path(job["folder"]) / "recipe.yaml"
    path.write_text(json.dumps(whole))  # JSON is YAML
    return str(path)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
