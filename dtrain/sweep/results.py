"""The result of a sweep: its table, the best recipe, and whether the best is ahead by chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import stdev
from typing import Any

from dtrain.config.load import dump
from dtrain.core.files import write_atomic
from dtrain.core.units import duration
from dtrain.monitoring.run_record import align
from dtrain.monitoring.uncertainty import compare_means
from dtrain.sweep.recipes import TrialRecipes
from dtrain.sweep.record import SweepDir, SweepRecord, Trial

MAX_REASON_LENGTH = 60


def ranked(record: SweepRecord) -> list[Trial]:
    """The trials: complete ones by their loss, then pruned, failed and unfinished ones."""
    order = ("complete", "pruned", "failed", "running")

    def rank(trial: Trial) -> tuple[Any, ...]:
        steps = -trial.points[-1][0] if trial.points else 0
        return (order.index(trial.state), trial.value or 0.0, steps, trial.number)

    return sorted(record.trials, key=rank)


def short_names(keys: Sequence[str]) -> list[str]:
    """The last words of each key that distinguish it from the others."""
    names = []
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            name = ".".join(words[-count:])
            if sum(f".{each}".endswith(f".{name}") for each in keys) == 1:
                break
        names.append(name)
    return names


def table(record: SweepRecord) -> list[list[str]]:
    """The head and a row for each trial, the best first."""
    keys = list(record.settings["parameters"])
    has_spread = record.settings["seeds"] > 1
    head = ["trial", "loss", *(["± seeds"] if has_spread else []), *short_names(keys)]
    rows = [[*head, "time", ""]]
    for trial in ranked(record):
        cells = [str(trial.number), f"{trial.value:.4f}" if trial.value is not None else "—"]
        if has_spread:
            cells.append(f"{stdev(trial.values):.4f}" if len(trial.values) > 1 else "—")
        cells += [_cell(trial.parameters.get(key)) for key in keys]
        seconds = sum(run.seconds for run in trial.runs)
        rows.append([*cells, duration(seconds), remark(trial)])
    return rows


def remark(trial: Trial) -> str:
    """How a trial ended, if it is not complete."""
    if trial.state == "pruned":
        step, loss = trial.points[-1] if trial.points else (0, None)
        return f"pruned at step {step}" + (f", loss {loss:.4f}" if loss is not None else "")
    if trial.state == "failed":
        reason = trial.reason
        return reason if len(reason) <= MAX_REASON_LENGTH else f"{reason[: MAX_REASON_LENGTH - 1]}…"
    return "" if trial.state == "complete" else "not finished"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(record: SweepRecord, folder: SweepDir) -> str:
    """The table, what the sweep took, and where the best recipe is."""
    blocks = [align(table(record)), "\n".join(_facts(record))]
    if record.best is not None:
        blocks.append(f"best recipe    {folder.best_recipe}\npage           {folder.page}")
    return "\n\n".join(blocks)


def _facts(record: SweepRecord) -> Iterator[str]:
    counts = {
        state: sum(trial.state == state for trial in record.trials)
        for state in ("complete", "pruned", "failed", "running")
    }
    words = {"running": "not finished"}
    text = ", ".join(f"{n} {words.get(state, state)}" for state, n in counts.items() if n)
    hours = record.gpu_hours
    spent = f"{hours:.2f} GPU-hours" if hours else f"{duration(record.seconds)}"
    yield f"{len(record.trials)} trials: {text}; {spent}"
    if record.shared:
        runs = "run" if len(record.shared) == 1 else "runs"
        yield f"the stages before the search were trained once, in {len(record.shared)} {runs}"
    if verdict := lead(record):
        yield verdict


def lead(record: SweepRecord) -> str:
    """Whether the best trial is better than the second by more than chance; needs seeds."""
    complete = [trial for trial in ranked(record) if trial.value is not None]
    if len(complete) < 2 or min(len(trial.values) for trial in complete[:2]) < 2:
        return ""
    best, second = complete[:2]
    difference = compare_means(second.values, best.values, is_paired=True)
    return f"trial {best.number} against trial {second.number}: {difference}"


def write_best(record: SweepRecord, folder: SweepDir, recipes: TrialRecipes) -> None:
    """Write the recipe of the best trial; nothing without a complete one."""
    if record.best is None:
        return
    trial = record.trials[record.best]
    values = ", ".join(f"{k}={_cell(v)}" for k, v in trial.parameters.items())
    head = (
        f"# Trial {trial.number} of {folder.path}: loss {trial.value:.4f} with {values}.\n"
        "# Running it merges what that trial has trained; in another output.folder it trains "
        "again.\n"
    )
    write_atomic(folder.best_recipe, head + dump(recipes.best(trial.parameters, trial.runs[0])))
