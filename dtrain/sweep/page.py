"""The result of a sweep as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dtrain.config.sweep import Sweep
from dtrain.core.files import write_atomic
from dtrain.core.lazy_import import LazyModule
from dtrain.core.units import duration
from dtrain.monitoring.compare import STYLE
from dtrain.sweep.record import SweepDir, SweepRecord, Trial
from dtrain.sweep.results import lead, ranked, short_names, table
from dtrain.sweep.search import Search

pictures: Any = LazyModule("dtrain.sweep.pictures")

TEMPLATE = Path(__file__).with_name("sweep.html.jinja")


def write_page(record: SweepRecord, folder: SweepDir) -> None:
    """Write the sweep's page: table, parallel coordinates, losses and importances."""
    write_atomic(folder.page, render_page(record, folder))


def render_page(record: SweepRecord, folder: SweepDir) -> str:
    """The page as HTML; all text in it is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sweep, trials = Sweep.model_validate(record.settings), ranked(record)
    names = short_names(list(sweep.parameters))
    rows = table(record)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        style=STYLE.read_text(encoding="utf-8"),
        title=folder.path.name,
        sweep=sweep,
        cards=_cards(record, trials),
        verdict=lead(record),
        parameters=pictures.plot_parameters(trials, sweep.space, names),
        losses=pictures.plot_losses(trials),
        importances=_importances(sweep, record, names),
        complete=sum(trial.value is not None for trial in trials),
        head=rows[0],
        rows=list(zip(rows[1:], trials, [_link(folder, t) for t in trials], strict=True)),
        best=_text(folder.best_recipe),
    )


def _cards(record: SweepRecord, trials: list[Trial]) -> list[tuple[str, str, str]]:
    """Title, figure and remark of the facts at the head of the page."""
    counts = {
        state: sum(trial.state == state for trial in trials)
        for state in ("complete", "pruned", "failed", "running")
    }
    others = ", ".join(f"{n} {state}" for state, n in counts.items() if n and state != "complete")
    cards = [("trials", f"{counts['complete']} complete", others)]
    if record.best is not None:
        best = record.trials[record.best]
        cards.insert(0, ("lowest loss", f"{best.value:.4f}", f"trial {best.number}"))
    hours = record.gpu_hours
    if hours:
        cards.append(("GPU-hours", f"{hours:.2f}", f"{duration(record.seconds)} in all"))
    else:
        cards.append(("time", duration(record.seconds), ""))
    if record.shared:
        runs = len(record.shared)
        cards.append(("shared stages", "trained once", f"{runs} run{'s' if runs > 1 else ''}"))
    return cards


def _importances(sweep: Sweep, record: SweepRecord, names: list[str]) -> list[tuple[str, float]]:
    shares = Search(sweep).importances(record.trials)
    by_key = dict(zip(sweep.parameters, names, strict=True))
    return [(by_key[key], 100 * share) for key, share in shares.items()]


def _link(folder: SweepDir, trial: Trial) -> str:
    """The report of a trial's first run, relative to the page; empty if there is none."""
    report = folder.run(trial.runs[0].name).html_report
    return str(report.relative_to(folder.path)) if report.is_file() else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
