"""What a task stage forgets, at equal task loss: terms against forgetting, replay, small adapters.

    python tests/bench/forgetting.py [--steps 16] [--every 4] [--folder DIR] [ARM ...]

Every arm trains the quickstart's model on the quickstart's questions. The general set is what the
base itself answers to prompts about anything else: its loss shows how far the model departs from
the base. Two in three of these answers are rows of replay, the others are held out. Both losses are
measured every few steps, and the arms are compared where they have the same held-out task loss, the
lowest that all of them reach, by interpolation between measurements: a method that learns less
forgets less, which is no merit. A run that is in the folder is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch

from dtrain.config.load import load_recipe
from dtrain.core.cache_paths import local_path
from dtrain.samples.make import ensure
from dtrain.serving.generator import TextGenerator
from dtrain.serving.run_models import ServedModel

ROOT = Path(__file__).parents[2]
RATE = 1e-3
LORA = "{kind: lora, r: 16, alpha: 32, dropout: 0.0}"
HELD_OUT_QUESTIONS, ANSWER_TOKENS = 20, 64
CPU = torch.device("cpu")
Curve = list[tuple[float, float]]
"""Held-out losses (task, general) in the course of a stage."""

# name → (method, learning rate, share of replay, term)
ARMS: dict[str, tuple[str, float, float, str]] = {
    "nothing": (LORA, RATE, 0.0, ""),
    "r 4, alpha 4": ("{kind: lora, r: 4, alpha: 4, dropout: 0.0}", RATE, 0.0, ""),
    "replay": (LORA, RATE, 0.25, ""),
    "replay, kl_to_base": (LORA, RATE, 0.25, "{kind: kl_to_base, weight: 1.0}"),
    "ewc": (LORA, RATE, 0.02, "{kind: ewc, weight: 10000.0}"),
    "l2_init": (LORA, RATE, 0.0, "{kind: l2_init, weight: 0.1}"),
}


def main() -> int:
    """Run the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--every", type=int, default=4, help="steps between measurements")
    parser.add_argument("--folder", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of: {'; '.join(ARMS)}")
    arguments = parser.parse_args()
    write_rows(arguments.folder)
    names = arguments.arms or list(ARMS)
    curves = {name: run_arm(name, arguments) for name in names}
    print(table(curves))
    return 0


def write_rows(folder: Path) -> None:
    """Write the rows of replay and the held-out rows, unless they are there."""
    if (folder / "task.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    ensure("python-docs")
    lines = local_path("dtrain:python-docs/general.jsonl").read_text().splitlines()
    first = [json.loads(line)["text"].partition(". ")[0] for line in lines]
    asked = [f"Continue in a few sentences: {sentence}." for sentence in first]
    base = TextGenerator(
        ServedModel(str(ensure("smollm2-135m"))), load_recipe("quickstart").model, CPU
    )
    prompts = [base.prompt([{"role": "user", "content": question}]) for question in asked]
    answers = [base.answers([prompt], ANSWER_TOKENS)[0] for prompt in prompts]
    rows = [
        {"instruction": question, "output": answer}
        for question, answer in zip(asked, answers, strict=True)
    ]
    questions = json.loads(local_path("dtrain:python-docs/task-heldout-small.json").read_text())
    replay = [row for number, row in enumerate(rows) if number % 3]
    (folder / "replay.json").write_text(json.dumps(replay))
    (folder / "general.json").write_text(json.dumps(rows[::3]))
    (folder / "task.json").write_text(json.dumps(questions[:HELD_OUT_QUESTIONS]))


def run_arm(name: str, arguments: argparse.Namespace) -> Curve:
    """Train an arm unless that is done; return its curve from the base on."""
    folder = arguments.folder / f"{name.replace(', ', '-').replace(' ', '-')}-{arguments.steps}"
    if not (folder / "lineage.json").exists():
        subprocess.run(command(name, folder, arguments), cwd=ROOT, check=True)
    losses = json.loads((folder / "evaluation.json").read_text())["losses"]
    lines = (folder / "task" / "metrics.jsonl").read_text().splitlines()
    measured = [record["held_out"] for record in map(json.loads, lines) if "held_out" in record]
    return [
        (losses["task"]["base"], losses["general"]["base"]),
        *((record["task"], record["general"]) for record in measured),
        (losses["task"]["task"], losses["general"]["task"]),
    ]


def command(name: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The command of an arm."""
    method, rate, replay, term = ARMS[name]
    data = "sequence_length: 256, sources: [{path: 'dtrain:python-docs/task-train.json'}]"
    if replay:
        data += f", replay: {{path: {arguments.folder.absolute()}/replay.json, ratio: {replay}}}"
    train = (
        f"global_batch_size: 2, micro_batch_size: 2, steps: {arguments.steps}, "
        f"learning_rate: {rate}, warmup_ratio: 0.1, lr_scheduler: constant, "
        f"evaluate_every_steps: {arguments.every}"
    )
    stage = f"name: task, kind: sft, method: {method}, data: {{{data}}}, train: {{{train}}}"
    sets = ", ".join(
        f"{name}: {{kind: sft, sequence_length: 256, sources: [{{path: "
        f"{arguments.folder.absolute()}/{name}.json}}]}}"
        for name in ("task", "general")
    )
    return [
        *(sys.executable, "-m", "dtrain", "run", "quickstart", "launch.processes=1"),
        f"stages=[{{{stage}{f', regularize: {term}' if term else ''}}}]",
        *(f"evaluation={{sets: {{{sets}}}}}", "output.merge=false", f"output.folder={folder}"),
    ]


def table(curves: dict[str, Curve]) -> str:
    """A row for each arm: the general loss where the task loss is equal, and the last losses."""
    equal = max(min(task for task, _ in curve) for curve in curves.values())
    start = next(iter(curves.values()))[0]
    lines = [
        f"Before: task {start[0]:.3f}, general {start[1]:.3f}. At a task loss of {equal:.3f}:",
        "",
        "| against forgetting | general loss | change | last: task | last: general |",
        "|---|---|---|---|---|",
    ]
    for name, curve in curves.items():
        general, (last_task, last_general) = general_at(equal, curve), curve[-1]
        change = general - start[1]
        cells = f"{general:.3f}", f"{change:+.3f}", f"{last_task:.3f}", f"{last_general:.3f}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def general_at(task: float, curve: Curve) -> float:
    """The general loss where a curve first reaches a task loss, by linear interpolation."""
    for (task_before, general_before), (task_after, general_after) in pairwise(curve):
        if task_after <= task:
            part = (task_before - task) / max(task_before - task_after, 1e-9)
            return general_before + part * (general_after - general_before)
    raise ValueError(f"the curve never reaches {task}")


if __name__ == "__main__":
    sys.exit(main())
