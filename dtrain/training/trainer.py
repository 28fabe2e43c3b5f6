"""The training loop, and the length of a stage."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch

from dtrain.checkpoints.folder import SCORE, WATCHED
from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.train import Train
from dtrain.data.loader import NO_SEQUENCE, Loader
from dtrain.distributed.tensor_utils import memory_metrics
from dtrain.engines.base import Engine
from dtrain.models.routing import ExpertLoad
from dtrain.objectives.base import Objective
from dtrain.planning.gpus import known_gpu
from dtrain.training.callbacks import Callback, CallbackGroup
from dtrain.training.checkpointer import Checkpointer
from dtrain.training.held_out import HeldOutEvaluator
from dtrain.training.lr_schedule import learning_rate
from dtrain.training.preemption import StopFlag
from dtrain.training.progress import StageProgress
from dtrain.training.train_step import StepResult, train_step

RECENT_STEPS = 20


class Trainer:
    """Trains one stage.

    Args:
        engine: the model and its optimizer.
        objective: what is minimized.
        loader: the stage's batches, by step number.
        checkpointer: saves `progress` and the engine's state.
        evaluator: evaluates held-out sets and decides on early stopping.
        stop: whether this process was asked to stop.
        callbacks: get each event in this order.
        progress: where to begin.
        seed: of the recipe, for dropout.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        objective: Objective,
        loader: Loader,
        checkpointer: Checkpointer,
        evaluator: HeldOutEvaluator,
        stop: StopFlag,
        callbacks: Sequence[Callback],
        progress: StageProgress,
        seed: int,
    ) -> None:
        self.engine, self.objective, self.loader, self.seed = engine, objective, loader, seed
        self.expert_load = ExpertLoad(engine.module)
        self.checkpointer, self.evaluator, self.stop = checkpointer, evaluator, stop
        self.callbacks: Callback = CallbackGroup(callbacks)
        self.progress, self._start = progress, replace(progress)
        self._recent_seconds: deque[float] = deque([0.0], maxlen=RECENT_STEPS)
        self._peak_flops = peak_flops(engine)
        self._save_seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of this attempt; 0 if it made no step."""
        return self.progress.tokens_per_second_since(self._start)

    def fit(self) -> bool:
        """Train to the end of the stage, to its early end, or until a rank is asked to stop.

        Returns:
            Whether the stage is finished; if not, the last checkpoint has the last step.

        Raises:
            UserError: the loss stays non-finite, or a checkpoint cannot be written.
        """
        progress, steps = self.progress, self.loader.steps
        interrupted = False
        try:
            self.callbacks.pre_train(progress, steps)
            self.evaluate_if_due()  # if the last attempt left it out because it had to stop
            while progress.step < steps and not progress.ended_early and not interrupted:
                result = self.train_one_step()
                # A rank that is asked to stop may have no time for an evaluation.
                interrupted = result.stop_votes > 0
                if not interrupted:
                    self.evaluate_if_due()
                is_last = interrupted or progress.ended_early or progress.step == steps
                if is_last or self.checkpointer.is_due(progress.step):
                    self.save()
            self.callbacks.post_train()
        finally:
            self.callbacks.close()
        self.checkpointer.wait_for_save()
        return not interrupted

    def use_best(self) -> tuple[Checkpoint, dict[str, Any]]:
        """Give the engine the weights of the stage's best checkpoint, after `fit`.

        Returns:
            The checkpoint, and what it was chosen by: `step`, `set`, `metric`, `value`, and the
            last step's `last_value`.
        """
        step = self.progress.step
        last = self.evaluator.measure_last(self.engine, self.progress)
        checkpoint, best = self.checkpointer.best(last, step)
        if checkpoint.step != step:
            self.engine.load(checkpoint)
        watched = last[WATCHED]
        sign = 1 if watched["metric"] == "loss" else -1
        value, last_value = (x[SCORE] and sign * x[SCORE] for x in (best, last))
        choice = {"step": checkpoint.step, "value": value, "last_value": last_value}
        return checkpoint, choice | {key: watched[key] for key in ("set", "metric")}

    def train_one_step(self) -> StepResult:
        """Compute a step, count it and log its metrics."""
        progress = self.progress
        rate = learning_rate(progress.step, self.loader.steps, self.engine.stage.train)
        wants_stop = self.stop.is_set(max(self._recent_seconds), self.checkpointer.save_seconds)
        result = train_step(self, progress.step, rate, wants_stop=wants_stop)
        self._recent_seconds.append(sum(result.seconds.values()))
        self.callbacks.post_train_batch()
        # A step that ends with a save is not counted before the last save is complete, so a crash
        # costs at most one interval of finished steps.
        if self.checkpointer.is_due(progress.step + 1):
            with self.callbacks.slow_section("waiting for the last save"):
                started = time.perf_counter()
                self.checkpointer.wait_for_save()
                self._save_seconds += time.perf_counter() - started
        started = time.perf_counter()
        self.count(result)
        metrics = self.step_metrics(result)
        result.seconds["other"] = time.perf_counter() - started
        metrics["seconds"] = {name: round(value, 4) for name, value in result.seconds.items()}
        self.callbacks.log_metrics(progress.step, metrics)
        self.callbacks.post_step(progress)
        return result

    def evaluate_if_due(self) -> None:
        """Evaluate the held-out sets if that is due after this step and not done yet."""
        if self.evaluator.is_due(self.progress, self.loader.steps):
            with self.callbacks.slow_section(f"evaluating after step {self.progress.step}"):
                started = time.perf_counter()
                metrics = self.evaluator.evaluate(self.engine, self.progress)
                seconds = {"evaluation": round(time.perf_counter() - started, 4)}
                self.callbacks.log_metrics(self.progress.step, metrics | {"seconds": seconds})

    def save(self) -> None:
        """Save a checkpoint of this step, in the background; the next step logs the time here."""
        with self.callbacks.slow_section(f"saving step {self.progress.step}"):
            started = time.perf_counter()
            measured = self.evaluator.measured(self.progress)
            self.checkpointer.save(self.engine, self.progress, measured)
            self._save_seconds += time.perf_counter() - started

    def count(self, result: StepResult) -> None:
        """Add a step to the progress."""
        progress = self.progress
        progress.step += 1
        progress.seconds += sum(result.seconds.values())
        progress.tokens += result.tokens
        progress.supervised_tokens += result.supervised_tokens
        if progress.starting_loss is None and result.finite:
            progress.starting_loss = result.loss
        progress.non_finite_in_a_row = 0 if result.finite else progress.non_finite_in_a_row + 1
        progress.non_finite += not result.finite

    def step_metrics(self, result: StepResult) -> dict[str, Any]:
        """Metrics of the step just counted."""
        step, loader = self.progress.step, self.loader
        sequences = min(step * loader.global_batch, loader.total_sequences)
        seconds = sum(result.seconds.values())
        metrics: dict[str, Any] = {
            "total_steps": loader.steps,
            "epoch": round(sequences / loader.dataset.sequences_per_epoch, 4),
            "loss": result.loss,
            "supervised_tokens": result.supervised_tokens,
            "tokens": result.tokens,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(result.tokens / max(seconds, 1e-9), 1),
            "communication_seconds": round(result.communication_seconds, 4),
            "time": round(time.time(), 3),
        } | memory_metrics(self.engine.world.device)
        if self._save_seconds:
            metrics["save_seconds"] = round(self._save_seconds, 4)
            self._save_seconds = 0.0
        if self._peak_flops is not None and self.engine.flops_per_token is not None:
            flops = self.engine.flops_per_token * metrics["tokens_per_second"]
            metrics["mfu"] = round(flops / (self._peak_flops * self.engine.world.size), 4)
        if result.metrics:
            metrics["metrics"] = result.metrics
        if result.sources:
            metrics["sources"] = result.sources
        if result.experts:
            metrics["experts"] = result.experts
        if not result.finite:
            metrics["skipped"] = "non-finite loss or gradient"
            sequence_ids = [int(i) for i in loader.batch(step - 1) if i != NO_SEQUENCE]
            metrics["documents"] = [
                d for i in sequence_ids for d in loader.dataset.sequence(i).documents
            ]
        return metrics


def peak_flops(engine: Engine) -> float | None:
    """Floating-point operations a second of a rank's device in the engine's compute dtype.

    None on a CPU, on a GPU whose data sheet is not known, and for float32, whose peak depends on
    the settings of torch.
    """
    device = engine.world.device
    if device.type != "cuda" or engine.compute_dtype == torch.float32:
        return None
    properties = torch.cuda.get_device_properties(device)
    gpu = known_gpu(properties.name, properties.total_memory)
    return gpu.tflops * 1e12 if gpu else None


def total_sequences(
    train: Train, sequences_in_epochs: Callable[[float], int], tokens_per_sequence: float
) -> int:
    """Sequences that the stage trains on; only `epochs` may end inside a global batch.

    Args:
        sequences_in_epochs: number of passes → sequences in them.
        tokens_per_sequence: mean number of tokens in a sequence, padding not counted.
    """
    batch = train.global_batch_size
    if train.steps is not None:
        return train.steps * batch
    if train.tokens is not None:
        return ceil(train.tokens / (tokens_per_sequence * batch)) * batch
    assert train.epochs is not None
    return sequences_in_epochs(train.epochs)
