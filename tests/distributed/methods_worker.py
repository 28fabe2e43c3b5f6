"""Ranks that train one method under some engines, for `test_methods.py`.

All runs share the processes and their group, as the start of a process costs more than a run. Each
rank writes what it found to its own file, a JSON object by engine.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserErrors
from dtrain.core.hashes import file_hash
from dtrain.data.loader import MicroBatch
from dtrain.distributed.hang_watchdog import HangWatchdog
from dtrain.distributed.world import World, end_world, start_world
from dtrain.pipeline import runner
from dtrain.pipeline.evaluator import Evaluations
from dtrain.pipeline.stage_inputs import prepare_inputs
from dtrain.rank_main import keep_libraries_quiet
from dtrain.training import train_step
from dtrain.training.preemption import StopFlag

sys.path.insert(0, str(Path(__file__).parents[1] / "architectures"))
import reference

runner.write_report = lambda run: None  # type: ignore[assignment] # a second of drawing
SAVED_STEP = "step-000002"


def main(arguments: list[str]) -> int:
    """Train under each engine, twice: once to the end, once from the checkpoint in the middle."""
    keep_libraries_quiet()
    world, request = start_world("cpu"), json.loads(arguments[0])
    found = {}
    for engine, overrides in request["runs"].items():
        try:
            recipe = load_recipe(request["recipe"], overrides)
        except UserErrors as error:
            found[engine] = {"refused": str(error.errors[0])}
            continue
        found[engine] = facts(recipe, world, Path(recipe.output.folder))
    Path(f"{request['found']}.{world.rank}").write_text(json.dumps(found))
    end_world()
    return 0


def facts(recipe: Recipe, world: World, run: Path) -> dict[str, Any]:
    """What a run logs and writes, and what its continuation does."""
    result: dict[str, Any] = {}
    with watched() as seen:
        base = train(recipe, world, run)
    if world.size == 1:
        result |= compare_with_peft(recipe, base, run / "task", seen)
    whole = losses(run), weights(run / "task")
    result["losses"] = whole[0]
    world.barrier()
    if world.is_first:
        as_killed_after_the_checkpoint(run / "task")
    world.barrier()
    with watched() as again:
        train(recipe, world, run)
    assert not again["batches"], "it began at the first step"
    result["resumes"] = (losses(run), weights(run / "task")) == whole
    return result


def train(recipe: Recipe, world: World, run: Path) -> Path:
    """Run the chain in this process as `rank_main.train` does; returns the base's folder."""
    run.mkdir(exist_ok=True)
    if world.is_first:
        prepare_inputs(recipe)
    world.barrier()
    inputs = prepare_inputs(recipe)
    stop = StopFlag(run, check_file=False)
    watchdog = HangWatchdog(run / "beats", world.rank, world.size, report=print)
    assert runner.run_chain(recipe, inputs, world, stop, watchdog, set())
    return inputs.base


def as_killed_after_the_checkpoint(stage: Path) -> None:
    """Leave what a kill after step 2 leaves."""
    for path in [*stage.iterdir(), *(stage / "checkpoints").iterdir()]:
        is_result = path.name in ("adapter", "merged") or path.name.startswith("step-")
        if is_result and path.name != SAVED_STEP:
            shutil.rmtree(path)
    (stage / "stage.json").unlink()


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    lines = (run / "task" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def weights(stage: Path) -> dict[str, str]:
    """Hashes of what a stage made."""
    files = sorted(stage.glob("[am]*/*.safetensors"))
    return {str(path.relative_to(stage)): file_hash(path) for path in files}


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Note the losses of each target of the first step, before the first and after the last update.

    Attributes of the result: batches, first, last.
    """
    seen: dict[str, Any] = {"batches": [], "first": [], "last": []}
    compute, record = train_step.compute_loss, Evaluations.record
    objectives: list[Any] = []

    def compute_loss(engine: Any, objective: Any, batch: MicroBatch, statistics: Any) -> Any:
        output = compute(engine, objective, batch, statistics)
        if engine.update_count == 0:
            objectives.append(objective)
            seen["batches"].append(batch)
            seen["first"].append(output.item_losses.detach())
        return output

    def after_training(self: Any, model: str, engine: Any, base: Path) -> None:
        engine.module.eval()
        with torch.no_grad():
            for objective in objectives[:1]:
                statistics = train_step.begin_step(engine, objective, seen["batches"])
            for batch in seen["batches"]:
                output = compute(engine, objectives[0], batch, statistics)
                seen["last"].append(output.item_losses)
        record(self, model, engine, base)

    train_step.compute_loss = compute_loss
    Evaluations.record = after_training  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        train_step.compute_loss = compute
        Evaluations.record = record  # type: ignore[method-assign]


def compare_with_peft(
    recipe: Recipe, base: Path, stage: Path, seen: dict[str, Any]
) -> dict[str, Any]:
    """Differences of the losses by target: from the base, from PEFT, from the merged model."""
    quantized = recipe.stages[0].method.traits.quantizes_base
    batches = seen["batches"]
    plain = reference.plain(base, "float32", quantized=quantized)
    first, last = torch.cat(seen["first"]), torch.cat(seen["last"])
    result = {"start": distance(first, losses_alone(plain, batches))}
    result["learned"] = float((first - last).mean())
    method = recipe.stages[0].method.adapter
    if method is not None and method.initial_adapter is not None:
        old = reference.adapted(base, Path(method.initial_adapter), "float32", quantized=quantized)
        result["continues"] = distance(first, losses_alone(old.eval(), batches))
    if (stage / "adapter").exists():
        try:
            PeftConfig.from_pretrained(stage / "adapter")
            model = reference.adapted(base, stage / "adapter", "float32", quantized=quantized)
            result["names"] = reference.key_differences(model, stage / "adapter")
            result["peft"] = distance(last, losses_alone(model.eval(), batches))
        except (KeyError, ValueError) as error:
            result["not peft"] = f"{type(error).__name__}: {error}"
    if (stage / "merged").exists():
        merged = reference.plain(stage / "merged", "float32")
        result["merged"] = distance(last, losses_alone(merged, batches))
    return result


def distance(left: Tensor, right: Tensor) -> float:
    """The greatest difference, relative to the greatest loss."""
    return float((left - right).abs().max() / right.abs().max())


@torch.no_grad()
def losses_alone(model: nn.Module, batches: list[MicroBatch]) -> Tensor:
    """The loss of each target of micro-batches, each document alone, by transformers or PEFT."""
    result = []
    for batch in batches:
        positions, start = batch.target_positions, 0
        for length in batch.document_lengths:
            inside = (positions >= start) & (positions < start + length)
            ids = batch.input_ids[:, start : start + length]
            logits = model(input_ids=ids, use_cache=False).logits[0, -length:]  # after a prompt
            at = positions[inside] - start
            result.append(cross_entropy(logits[at], batch.targets[inside], reduction="none"))
            start += length
    return torch.cat(result)
