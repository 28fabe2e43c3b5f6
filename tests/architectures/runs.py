"""dtrain's runs of a tiny model: real recipes, real ranks, and what their third step computed."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import torch
from peft.tuners.lora import LoraLayer

from dtrain import rank_main
from dtrain.core.errors import Exit
from dtrain.engines.ddp import Ddp
from dtrain.models.expert_nf4 import holds_nf4
from dtrain.pipeline import runner
from dtrain.training import train_step

SECONDS = 240
NOT_PACKED = "cannot be packed"  # in dtrain's refusal of what it trains one document a sequence
WITHOUT_EXPERTS = "method.experts=false"  # in its refusal of experts that cannot get adapters
OBSERVED_UPDATES = 2  # updates before the observed one: B, which begins as zero, has grown
RECIPE = """
name: sweep
device: cpu
model: {{base: {base}, dtype: {dtype}, attention: {attention}}}
engine: {{kind: ddp}}
stages:
  - name: domain
    kind: cpt
    method: {{kind: lora, r: 8, alpha: 16, dropout: 0.0}}
    data:
      sequence_length: 128
      packing: {packing}
      sources: [{{path: "dtrain:tiny-text/domain.jsonl", format: text}}]
    train: &train {{global_batch_size: 4, steps: 3, learning_rate: 1.0e-2, warmup_ratio: 0.0}}
  - name: task
    kind: sft
    method: {{kind: lora, r: 4, alpha: 8, dropout: 0.1}}
    data:
      sequence_length: 128
      packing: {packing}
      sources: [{{path: "dtrain:tiny-text/task.json", format: alpaca}}]
    train: *train
output: {{folder: {folder}}}
"""


@dataclass
class Run:
    """A finished run.

    Attributes:
        status: a refusal by the first rank, else that of the rank that fared worst.
        output: of all ranks, or of the one that refused.
    """

    folder: Path
    status: int
    output: str

    @property
    def refusal(self) -> str:
        """The reason of a refusal; empty if there was none."""
        return reason_of(self.output) if self.status == Exit.USER_ERROR else ""

    @property
    def needs_no_experts(self) -> bool:
        """Whether the refusal names training without adapters on experts as the way out."""
        return bool(self.refusal) and WITHOUT_EXPERTS in self.output

    @property
    def crash(self) -> str:
        """How it failed without a reason for the user; empty if it did not."""
        if self.status in (Exit.FINISHED, Exit.USER_ERROR):
            return ""
        lines = [line for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
        last = (errors or lines or ["no word"])[-1].strip()
        return f"status {self.status}: {last[:200]}"

    def records(self, stage: str = "domain") -> list[dict[str, Any]]:
        """The lines of a stage's metrics.jsonl that describe a step."""
        path = self.folder / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for line in lines if "loss" in (record := json.loads(line))]

    def losses(self, stage: str = "domain") -> list[float]:
        return [float(record["loss"]) for record in self.records(stage)]

    def observed(self) -> list[dict[str, Any]]:
        """What each rank noted."""
        paths = sorted(self.folder.parent.glob(f"{self.folder.name}.noted.*"))
        return [torch.load(path, weights_only=True) for path in paths]

    def said(self, start: str) -> str:
        """The rest of the first line that begins so."""
        lines = (line for line in self.output.splitlines() if line.startswith(start))
        return next(lines, "").removeprefix(start).strip()


def reason_of(output: str) -> str:
    """The first line of an error for the user, without the folder that it names."""
    lines = output.splitlines()
    for line in lines:
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    return lines[-1] if lines else "no word"


def run(
    base: Path,
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    ranks: int = 1,
    stages: int = 2,
    dtype: str = "float32",
    attention: str = "auto",
    packing: bool = True,
) -> Run:
    """Run the recipe as `dtrain run` does after its launcher, to its end or to its time limit."""
    text = RECIPE.format(
        base=base,
        dtype=dtype,
        attention=attention,
        packing="true" if packing else "false",
        folder=folder,
    )
    if stages == 1:
        head, rest = text.split("  - name: task")
        text = head + rest[rest.index("output:") :].replace("}", ", merge: false}")
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(text)
    noted = folder.with_name(f"{folder.name}.noted")
    children = forks.start_ranks(
        lambda: rank_of_run(recipe, list(overrides), noted), ranks, folder.with_suffix(".log")
    )
    deadline = time.monotonic() + SECONDS
    statuses = [child.wait(deadline) for child in children]
    logs = [child.log.read_text(errors="replace") for child in children]
    if statuses[0] == Exit.USER_ERROR:  # the others lose the store that it served
        return Run(folder, statuses[0], logs[0])
    return Run(folder, max(statuses, key=severity), "".join(logs))


def severity(status: int) -> int:
    """Crashes say more than refusals."""
    return {Exit.FINISHED: 0, Exit.USER_ERROR: 1}.get(
        Exit(status) if status in list(Exit) else -1, 2
    )


def rank_of_run(recipe: Path, overrides: list[str], noted: Path) -> int:
    """One rank."""
    observe(noted)
    runner.write_report = lambda run: None  # type: ignore[assignment] # a second of drawing
    return rank_main.work(
        argparse.Namespace(recipe=str(recipe), overrides=overrides, allow_change=[])
    )


def observe(noted: Path) -> None:
    """Note what the first stage computes, by looking on: no number changes.

    Written at the observed step: the micro-batches of all steps so far with the loss of each
    target, and, under ddp, what trains with its gradient over all ranks, before the update.
    """
    import os

    steps: list[list[dict[str, Any]]] = [[]]
    layers: dict[str, str] = {}
    forward, update = train_step.compute_loss, Ddp.step

    def save(**more: Any) -> None:
        path = noted.with_name(f"{noted.name}.{os.environ['RANK']}")
        torch.save({"steps": steps, "layers": layers, **more}, path)

    def compute_loss(engine: Any, objective: Any, batch: Any, statistics: Any = None) -> Any:
        output = forward(engine, objective, batch, statistics)
        if engine.stage.name == "domain":
            if not layers:
                layers.update(base_layers(engine.module))
                save()
            if engine.update_count == len(steps):
                steps.append([])
            steps[-1].append(
                {
                    "ids": batch.input_ids.flatten().clone(),
                    "documents": list(batch.document_lengths),
                    "target_positions": batch.target_positions.clone(),
                    "targets": batch.targets.clone(),
                    "losses": output.item_losses.clone()[: len(batch.targets)],
                }
            )
        return output

    def step(engine: Any, learning_rate: float) -> float:
        if engine.stage.name == "domain" and engine.update_count == OBSERVED_UPDATES:
            save(
                weights={n: p.detach().clone() for n, p in engine.trainable},
                gradients={n: p.grad.clone() for n, p in engine.trainable if p.grad is not None},
            )
        return float(update(engine, learning_rate))

    train_step.compute_loss = compute_loss
    Ddp.step = step  # type: ignore[method-assign]


def base_layers(model: torch.nn.Module) -> dict[str, str]:
    """The class of the layer under each adapter; it shows NF4 that was never quantized."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            empty = hasattr(base, "quant_state") and base.quant_state is None
            kind = "Linear4bit" if holds_nf4(base) else type(base).__name__
            layers[name] = kind + (" without state" if empty else "")
    return layers
