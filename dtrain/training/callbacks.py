"""Callbacks of the trainer: progress bar, hang watchdog, alerts, and stops on failing losses.

A callback overrides the events that it needs. Events come in this order:

    pre_train
    for each step:
        pre_micro_batch (for each micro-batch), pre_optim_step, post_train_batch,
        log_metrics, post_step
        log_metrics again, if held-out sets are evaluated after the step
    post_train (unless an exception ended the training)
    close (always)

Trackers, which send metrics somewhere, are callbacks in `dtrain/training/trackers/`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from dtrain.config.schema import Stage
from dtrain.core.errors import Exit, UserError
from dtrain.core.log import Meter, progress, warn
from dtrain.core.run_dir import FolderIdentity
from dtrain.core.units import count, size
from dtrain.distributed.hang_watchdog import HangWatchdog
from dtrain.monitoring.alerts import WINDOW, Alert, find_alerts
from dtrain.training.progress import StageProgress

# A loss above this many times its start, plus the margin (nats), has diverged.
DIVERGED_RATIO, DIVERGED_MARGIN = 1.5, 0.5
MIN_WINDOW = 3  # steps whose median loss counts, in a short stage
ALERT_STEPS = 500  # the newest that are looked at: each look is then a matter of milliseconds


class Callback:
    """Events of a stage's training; every one does nothing by default."""

    def pre_train(self, stage: StageProgress, total_steps: int) -> None:
        """Before the first step of this attempt."""

    def pre_micro_batch(self, step: int, index: int, count: int) -> None:
        """Before the forward pass of micro-batch `index` of `count`, both counted from 1."""

    def pre_optim_step(self, step: int) -> None:
        """Before the optimizer update of step `step`, counted from 1."""

    def post_train_batch(self) -> None:
        """After the optimizer update, before the step is counted."""

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Metrics of a step, or of an evaluation after it.

        Args:
            step: steps finished.
            metrics: of a step the keys of `Trainer.step_metrics`; of an evaluation the losses of
                the held-out sets. JSON can represent all values except NaN and infinity.
        """

    def post_step(self, stage: StageProgress) -> None:
        """After the step is counted and its metrics are logged, before evaluation and save."""

    def slow_section(self, description: str) -> AbstractContextManager[object]:
        """Wraps an operation that may take any time: a save, an evaluation."""
        return nullcontext()

    def post_train(self) -> None:
        """After the last step of this attempt."""

    def close(self) -> None:
        """Release what the callback holds."""


class Tracker(Callback):
    """A callback that sends metrics somewhere; those that show alerts get each kind once."""

    def log_alert(self, alert: Alert) -> None:
        """Show a problem in the stage's curves; by default it is in the log alone."""


class CallbackGroup(Callback):
    """Passes each event to several callbacks, in order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def pre_train(self, stage: StageProgress, total_steps: int) -> None:
        for callback in self._callbacks:
            callback.pre_train(stage, total_steps)

    def pre_micro_batch(self, step: int, index: int, count: int) -> None:
        for callback in self._callbacks:
            callback.pre_micro_batch(step, index, count)

    def pre_optim_step(self, step: int) -> None:
        for callback in self._callbacks:
            callback.pre_optim_step(step)

    def post_train_batch(self) -> None:
        for callback in self._callbacks:
            callback.post_train_batch()

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        for callback in self._callbacks:
            callback.log_metrics(step, metrics)

    def post_step(self, stage: StageProgress) -> None:
        for callback in self._callbacks:
            callback.post_step(stage)

    @contextmanager
    def slow_section(self, description: str) -> Iterator[None]:
        with ExitStack() as stack:
            for callback in self._callbacks:
                stack.enter_context(callback.slow_section(description))
            yield

    def post_train(self) -> None:
        for callback in self._callbacks:
            callback.post_train()

    def close(self) -> None:
        with ExitStack() as stack:  # all of them are closed, even if one raises
            for callback in self._callbacks:
                stack.callback(callback.close)


class RunFolderWatch(Callback):
    """Ends the run after a step in which its folder was moved: what is saved would be lost."""

    def __init__(self, run: Path) -> None:
        self._identity = FolderIdentity(run)

    def post_step(self, stage: StageProgress) -> None:
        self._identity.check()


class HangWatchdogCallback(Callback):
    """Reports the main thread's position to the hang watchdog."""

    def __init__(self, watchdog: HangWatchdog) -> None:
        self._watchdog = watchdog

    def pre_micro_batch(self, step: int, index: int, count: int) -> None:
        self._watchdog.record_position(f"step {step}, micro-batch {index} of {count}")

    def pre_optim_step(self, step: int) -> None:
        self._watchdog.record_position(f"step {step}, update")

    def post_train_batch(self) -> None:
        self._watchdog.step()

    def slow_section(self, description: str) -> AbstractContextManager[object]:
        return self._watchdog.patience(description)

    def post_train(self) -> None:
        self._watchdog.rest()


class ProgressBar(Callback):
    """Steps done, time left, and the newest figures, on the terminal or in the log.

    Args:
        title: of the stage.
        steps_after: steps as long as this stage's that the later stages take.
    """

    def __init__(self, title: str, steps_after: float = 0) -> None:
        self._title, self._steps_after = title, steps_after
        self._stack = ExitStack()
        self._meter: Meter | None = None

    def pre_train(self, stage: StageProgress, total_steps: int) -> None:
        bar = progress(
            self._title, total_steps, stage.step, scope=" in this stage", after=self._steps_after
        )
        self._meter = self._stack.enter_context(bar)

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if self._meter is not None and "loss" in metrics:
            self._meter.advance(note=describe_step(metrics))

    def close(self) -> None:
        self._stack.close()


def describe_step(metrics: Mapping[str, Any]) -> str:
    """The figures of a step on a line, with the peak memory of this rank."""
    figures = [
        f"loss {metrics['loss']:.4f}",
        f"lr {metrics['learning_rate']:.1e}",
        f"grad norm {metrics['grad_norm']:.2g}",
        f"{count(metrics['tokens_per_second'])} tokens/s",
    ]
    if "peak_memory_bytes" in metrics:
        figures.append(f"memory {size(metrics['peak_memory_bytes'])}")
    return "  ".join(figures)


class NonFiniteStop(Callback):
    """Warns of each skipped update and ends a stage whose updates are skipped again and again.

    Args:
        stage: the stage's name.
        max_steps: non-finite steps in a row that end it.
    """

    def __init__(self, stage: str, max_steps: int) -> None:
        self._stage, self._max_steps = stage, max_steps

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if "skipped" in metrics:
            documents = metrics["documents"]
            warn(
                f"step {step}: loss or gradient is not finite, update skipped; "
                f"documents: {', '.join(documents[:5])}{' …' if len(documents) > 5 else ''}"
            )

    def post_step(self, stage: StageProgress) -> None:
        """Raise a UserError if the last steps were all non-finite."""
        if stage.non_finite_in_a_row >= self._max_steps:
            raise UserError(
                f"loss or gradient was not finite {stage.non_finite_in_a_row} steps in a row",
                where=f"stage {self._stage}, step {stage.step}",
                fix="lower train.learning_rate, or check the documents listed in metrics.jsonl",
                status=Exit.NON_FINITE,
            )


class DivergenceStop(Callback):
    """Ends a stage whose loss is far above its start, or warns once.

    Args:
        stage: of the recipe.
        held_out_before: returns the losses of the held-out sets before the stage, by name.
    """

    def __init__(self, stage: Stage, held_out_before: Callable[[], Mapping[str, float]]) -> None:
        self._stage, self._held_out_before = stage, held_out_before
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._warned = False

    def pre_train(self, stage: StageProgress, total_steps: int) -> None:
        self._recent = deque(maxlen=min(WINDOW, max(MIN_WINDOW, total_steps // 4)))

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        if metrics.get("loss") is not None and isfinite(metrics["loss"]):
            self._recent.append(metrics["loss"])
        self.check_held_out(step, metrics.get("held_out", {}))

    def post_step(self, stage: StageProgress) -> None:
        """Raise a UserError if the median of the last losses is far above the first."""
        if len(self._recent) == self._recent.maxlen and stage.starting_loss is not None:
            now = median(self._recent)
            self._check(stage.step, "the training loss", stage.starting_loss, now)

    def check_held_out(self, step: int, losses: Mapping[str, float]) -> None:
        """Raise a UserError if the loss of the set `evaluate_on` is far above its start."""
        name = self._stage.train.evaluate_on or next(iter(losses), None)
        before = self._held_out_before()
        if name is not None and name in losses and name in before:
            self._check(step, f"the held-out loss of {name}", before[name], losses[name])

    def _check(self, step: int, subject: str, before: float, now: float) -> None:
        if now <= DIVERGED_RATIO * max(before, 0.0) + DIVERGED_MARGIN:
            return
        rate = self._stage.train.learning_rate
        message = f"{subject} is {now:.3f}, {before:.3f} at the start of the stage: it diverged"
        where = f"stage {self._stage.name}, step {step}"
        advice = f"lower train.learning_rate ({rate:g} now) to a half or a tenth"
        if self._stage.train.on_divergence == "stop":
            fix = f"{advice}; or go on with train.on_divergence: warn"
            raise UserError(message, where=where, fix=fix, status=Exit.DIVERGED)
        if not self._warned:
            warn(f"{where}: {message}; {advice}")
            self._warned = True


class AlertWatch(Callback):
    """Warns once of each kind of alert that a stage's metrics show, here and in trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._start: list[dict[str, Any]] = []
        self._recent: deque[dict[str, Any]] = deque(maxlen=ALERT_STEPS)
        self._warned: set[str] = set()

    def log_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        records = self._start if len(self._start) < WINDOW else self._recent
        records.append({"step": step, **metrics})
        if "loss" not in metrics or step % WINDOW:
            return
        for alert in find_alerts([*self._start, *self._recent]):
            if alert.kind not in self._warned:
                self._warned.add(alert.kind)
                warn(str(alert))
                for tracker in self._trackers:
                    tracker.log_alert(alert)
