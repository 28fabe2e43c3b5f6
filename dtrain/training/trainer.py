"""The only training loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from dtrain.core.errors import Exit, UserError
from dtrain.core.log import Meter, progress, say, warn
from dtrain.data.loader import NO_ROW, Loader
from dtrain.distributed.hang_watchdog import Watch
from dtrain.distributed.memory import peak_memory_bytes
from dtrain.engines.base import Engine
from dtrain.monitoring.metrics import Metrics
from dtrain.training.lr_schedule import learning_rate
from dtrain.training.train_step import StepResult, held_out_loss, train_step

RECENT_STEPS = 20


@dataclass
class Progress:
    """How far a stage is; all that a checkpoint must know beside tensors."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    non_finite_in_a_row: int = 0
    non_finite: int = 0
    ended_early: bool = False
    evaluated_step: int = 0
    held_out: dict[str, float | None] = field(default_factory=dict)
    best_held_out: float | None = None
    evaluations_without_best: int = 0
    seconds: float = 0.0


@dataclass
class Job:
    """A stage ready to train.

    Attributes:
        held_out: loaders of the evaluation sets, by name.
        watched: the set that early stopping looks at.
        save: writes a checkpoint of this moment, on in the background.
        settle: waits for the checkpoint under way.
        wants_stop: whether this process was asked to stop, given the longest recent step's seconds.
        watch: told of every step, and of what may take longer.
    """

    engine: Engine
    loader: Loader
    held_out: dict[str, Loader]
    watched: str | None
    metrics: Metrics | None
    progress: Progress
    seed: int
    save: Callable[[Progress], None]
    settle: Callable[[], None]
    wants_stop: Callable[[float], bool]
    watch: Watch

    @property
    def train(self) -> Any:
        """The recipe's `train` group."""
        return self.engine.stage.train

    def held_out_loss(self) -> float | None:
        """Of the watched set, if it was measured after this very step and is finite."""
        now = self.progress
        if self.watched is None or now.evaluated_step != now.step:
            return None
        return now.held_out.get(self.watched)


def fit(job: Job) -> str:
    """Train to the end, or to the first reason to stop.

    Returns:
        "finished", "early stop" or "stop asked".

    Raises:
        UserError: loss or gradients stayed non-finite.
    """
    steps, now = job.loader.steps, job.progress
    recent: deque[float] = deque([0.0], maxlen=RECENT_STEPS)
    with progress(f"stage {job.engine.stage.name}", steps, done=now.step) as bar:
        evaluate_if_due(job)  # what a stop left out
        while now.step < steps and not now.ended_early:
            rate = learning_rate(now.step, steps, job.train)
            stop_asked = job.wants_stop(max(recent))
            result = train_step(job, now.step, rate, wants_stop=stop_asked)
            recent.append(sum(result.seconds.values()))
            job.watch.step()
            settle_if_due(job)
            record(job, result, bar)
            refuse_non_finite(job)
            if not result.stop_votes:  # who is asked to stop may have no time for it
                evaluate_if_due(job)
            ends = result.stop_votes or now.ended_early or now.step == steps
            if ends or due(now.step, job.train.checkpoint_every_steps):
                with job.watch.patience(f"saving step {now.step}"):
                    job.save(now)
            if result.stop_votes:
                return "stop asked"
    return "early stop" if now.ended_early else "finished"


def speed_since(before: Progress, now: Progress) -> float:
    """Tokens a second of the steps in between; 0 if there was none."""
    if now.step == before.step:
        return 0.0
    return (now.tokens - before.tokens) / max(now.seconds - before.seconds, 1e-9)


def settle_if_due(job: Job) -> None:
    """Finish the save under way before a step counts as done that ends with a save of its own.

    A crash then costs one interval of finished steps at most.
    """
    if due(job.progress.step + 1, job.train.checkpoint_every_steps):
        with job.watch.patience("waiting for the save before"):
            job.settle()


def write(job: Job, record: dict[str, Any]) -> None:
    """Write a line of metrics, on the rank that keeps them."""
    if job.metrics is not None:
        job.metrics.write(record)


def result_epoch(job: Job, steps: int) -> float:
    """Passes over the data after `steps` steps."""
    loader = job.loader
    rows = min(steps * loader.global_batch, loader.total_rows)
    return rows / loader.mixture.rows_per_epoch


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after `step` steps."""
    return every is not None and step % every == 0


def record(job: Job, result: StepResult, bar: Meter) -> None:
    """Count the step and write its line."""
    now, started = job.progress, time.perf_counter()
    number = now.step
    now.step += 1
    seconds = sum(result.seconds.values())
    now.seconds += seconds
    now.tokens += result.tokens
    now.supervised_tokens += result.supervised_tokens
    now.non_finite_in_a_row = 0 if result.finite else now.non_finite_in_a_row + 1
    now.non_finite += not result.finite
    line: dict[str, Any] = {
        "step": now.step,
        "epoch": round(result_epoch(job, now.step), 4),
        "loss": result.loss,
        "supervised_tokens": result.supervised_tokens,
        "tokens": result.tokens,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": round(result.tokens / max(seconds, 1e-9), 1),
        "peak_memory_bytes": peak_memory_bytes(job.engine.world.device),
    }
    if sources := job.loader.tokens_by_source(number):
        line["sources"] = with_losses(sources, result.source_losses)
    if not result.finite:
        line |= non_finite_line(job, number)
    result.seconds["other"] = time.perf_counter() - started
    write(job, line | {"seconds": {k: round(v, 4) for k, v in result.seconds.items()}})
    bar.advance(note=f"loss {result.loss:.4f}  {line['tokens_per_second']:.0f} tokens/s")


def with_losses(
    sources: dict[str, dict[str, int]], sums: list[float]
) -> dict[str, dict[str, float]]:
    """The counts of each source, and the loss of those that gave something to learn."""
    return {
        name: counts
        | ({"loss": total / targets} if (targets := counts["supervised_tokens"]) else {})
        for (name, counts), total in zip(sources.items(), sums, strict=True)
    }


def non_finite_line(job: Job, step: int) -> dict[str, Any]:
    """Say that an update was skipped, and which documents the batch held."""
    loader = job.loader
    rows = [int(row) for row in loader.batch(step) if row != NO_ROW]
    documents = [place for row in rows for place in loader.mixture.row(row).documents]
    warn(
        f"step {step + 1}: loss or gradient is not finite, update skipped; "
        f"documents: {', '.join(documents[:5])}{' …' if len(documents) > 5 else ''}"
    )
    return {"skipped": "non-finite loss or gradient", "documents": documents}


def evaluate_if_due(job: Job) -> None:
    """Evaluate after this step if that is due and was not done; it may end the stage."""
    now, train = job.progress, job.train
    missing = now.evaluated_step < now.step < job.loader.steps
    if not missing or not due(now.step, train.evaluate_every_steps):
        return
    with job.watch.patience(f"evaluating after step {now.step}"):
        evaluate(job)
    patience = train.early_stopping_patience
    if patience is not None and now.evaluations_without_best >= patience:
        say(f"step {now.step}: no better held-out loss in {patience} evaluations: early stop")
        now.ended_early = True


def evaluate(job: Job) -> None:
    """Measure every held-out set, and remember whether the watched one got better."""
    now = job.progress
    now.evaluated_step = now.step
    losses = {name: held_out_loss(job.engine, loader) for name, loader in job.held_out.items()}
    now.held_out = {name: loss if isfinite(loss) else None for name, loss in losses.items()}
    write(job, {"step": now.step, "held_out": losses})
    told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    say(f"step {now.step}: held-out loss: {told}")
    if job.watched is None:
        return
    loss = losses[job.watched]
    better = isfinite(loss) and (now.best_held_out is None or loss < now.best_held_out)
    now.evaluations_without_best = 0 if better else now.evaluations_without_best + 1
    now.best_held_out = loss if better else now.best_held_out


def refuse_non_finite(job: Job) -> None:
    """End a stage whose loss or gradients stay non-finite.

    Raises:
        UserError: saying so.
    """
    now = job.progress
    if now.non_finite_in_a_row >= job.train.max_non_finite_steps:
        raise UserError(
            f"loss or gradient was not finite {now.non_finite_in_a_row} steps in a row",
            where=f"stage {job.engine.stage.name}, step {now.step}",
            fix="lower train.learning_rate, or look at the documents named in metrics.jsonl",
            status=Exit.NON_FINITE,
        )
