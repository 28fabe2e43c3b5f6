"""A run's report as one self-contained HTML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined, Undefined

from dtrain.config.methods import TRAITS
from dtrain.config.objectives import OBJECTIVES
from dtrain.core.files import write_atomic
from dtrain.core.lazy_import import LazyModule
from dtrain.core.run_dir import RunDir
from dtrain.core.units import count, duration, local_time, size
from dtrain.monitoring.alerts import find_alerts
from dtrain.monitoring.run_record import (
    RunRecord,
    describe_used,
    format_loss,
    rate_change,
    read_run,
)
from dtrain.monitoring.starts import Start

# Only the rank that writes the report needs matplotlib.
plots: Any = LazyModule("dtrain.monitoring.plots")

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STYLE = Path(__file__).with_name("report.css")
MAX_SKIPPED = 20  # skipped steps that are listed
LIMITS = ("max_increase", "max_drop")

MetricLines = list[dict[str, Any]]


def write_report(run: Path, price: float | None = None) -> Path:
    """Write report.html into the run folder, as far as the run has come.

    The file has no external resources, and all text in it is escaped.

    Args:
        price: of an hour of one GPU, in any currency.
    """
    path = RunDir(run).html_report
    write_atomic(path, render_report(read_run(run), price))
    return path


def render_report(record: RunRecord, price: float | None = None) -> str:
    """The report as HTML; see `write_report`."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "loss": format_loss,
        "rating": rate_change,
        "short": _short_hash,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    finished, progress = _progress(record)
    return template.render(
        style=STYLE.read_text(encoding="utf-8"),
        record=record,
        finished=finished,
        progress=progress,
        headline=_headline(record),
        start=_start(record, price),
        attempts=_attempts(record),
        gates=_gates(record),
        base=record.lineage.get("base") or {},
        lineage=[_origin(artifact) for artifact in record.artifacts.values()],
        chain=_chain(record, finished),
        stages=[_stage(record, n) for n in dict.fromkeys([*record.metrics, *record.artifacts])],
    )


def _short_hash(identity: object) -> str:
    """The first twelve digits of a fingerprint."""
    return "—" if identity is None or isinstance(identity, Undefined) else str(identity)[:12]


def _progress(record: RunRecord) -> tuple[bool, str]:
    """Whether the run has finished, and its progress in words."""
    names = [str(stage["name"]) for stage in record.stages]
    done = [name for name in names if name in record.artifacts]
    if names and len(done) == len(names):
        return True, "finished"
    if record.metrics or done:
        return False, f"{len(done)} of {len(names) or '?'} stages finished"
    return False, "not started"


def _headline(record: RunRecord) -> str:
    base = (record.recipe.get("model") or {}).get("base", "unknown base model")
    engine = (record.recipe.get("engine") or {}).get("kind")
    seconds = sum(a.get("seconds") or 0 for a in record.artifacts.values())
    texts = [
        str(base),
        f"{len(record.stages)} stages" if record.stages else "",
        f"engine {engine}" if engine else "",
        f"{duration(seconds)} of training" if seconds else "",
    ]
    return " · ".join(text for text in texts if text)


def _start(record: RunRecord, price: float | None) -> str:
    """When, where and on what the run was started, and what it cost."""
    if not record.starts:
        return ""
    first, last = record.starts[0].start, record.starts[-1].start
    hours = record.gpu_hours
    texts = [
        local_time(first.started),
        f"{last.nodes} nodes, first {last.host}" if last.nodes > 1 else last.host,
        f"{last.gpus} x {last.device}" if last.gpus else f"{last.ranks} processes on a CPU",
        f"{len(record.starts)} attempts" if len(record.starts) > 1 else "",
        f"{hours:.2f} GPU-hours" if hours else "",
        f"{hours * price:,.2f} at {price:g} per GPU-hour" if hours and price is not None else "",
    ]
    return " · ".join(text for text in texts if text)


def _attempts(record: RunRecord) -> list[dict[str, Any]]:
    """Rows of the attempts, with their place on the time axis in percent."""
    if not record.starts:
        return []
    began = record.starts[0].start.started
    whole = max(max(timed.ended for timed in record.starts) - began, 1e-9)
    return [
        {
            "number": number,
            "began": local_time(attempt.start.started),
            "took": duration(attempt.seconds),
            "where": ", job ".join(filter(None, (_hosts(attempt.start), attempt.start.job))),
            "ranks": f"{attempt.start.ranks} x {attempt.start.device}",
            "end": _end(attempt.start),
            "steps": ", ".join(f"{stage} {steps}" for stage, steps in attempt.steps.items()),
            "left": 100 * (attempt.start.started - began) / whole,
            "width": 100 * attempt.seconds / whole,
        }
        for number, attempt in enumerate(record.starts, start=1)
    ]


def _hosts(start: Start) -> str:
    """The names of the nodes, and where they differ the devices of each."""
    if len(set(start.hosts.values())) > 1:
        return "; ".join(f"{host}: {devices}" for host, devices in start.hosts.items())
    return ", ".join(start.hosts) or start.host


def _end(start: Start) -> str:
    """How an attempt ended, as far as it is recorded."""
    if not start.outcome:
        return "not recorded: it runs, or was killed"
    is_explained = start.outcome == "failed" and start.reason
    return f"{start.outcome}: {start.reason}" if is_explained else start.outcome


def _gates(record: RunRecord) -> list[tuple[str, str]]:
    """Each gate's name and limit."""
    gates = (record.recipe.get("evaluation") or {}).get("gates") or {}
    rows = []
    for name, gate in gates.items():
        limits = [
            f"{key.replace('_', ' ')} {gate[key]}" for key in LIMITS if gate.get(key) is not None
        ]
        default = "loss" if name in (record.evaluation.get("losses") or {}) else "score"
        rows.append((str(name), f"{gate.get('metric') or default}: {', '.join(limits)}"))
    return rows


def _origin(artifact: dict[str, Any]) -> dict[str, Any]:
    """What an artifact was made from, for the drawing of the lineage."""
    made_from = artifact.get("made_from") or {}
    return {
        "name": artifact["name"],
        "identity": artifact.get("identity"),
        "data": made_from.get("data"),
        "settings": json.dumps(made_from.get("settings"), indent=2, ensure_ascii=False),
        "adapter": artifact.get("adapter"),
        "merged": artifact.get("merged"),
    }


def _chain(record: RunRecord, finished: bool) -> list[dict[str, Any]]:
    """The boxes of the chain: base model, each stage, merged model."""
    base = str((record.recipe.get("model") or {}).get("base", "base"))
    base_name = base.split("/")[-1].removeprefix("dtrain:")
    boxes = [_box("model", base_name, ["base model"], done=True)]
    is_adapter = False
    for stage in record.stages:
        name = str(stage["name"])
        kind = str(stage.get("kind", ""))
        lines = [OBJECTIVES[kind].title if kind in OBJECTIVES else kind]
        lines.append(_method_text(stage.get("method") or {}))
        step = "merge" if len(boxes) > 1 else ""
        if is_adapter and stage.get("adapter_name"):  # it starts where the one before it started
            step = "same base"
        is_adapter = bool(stage.get("adapter_name"))
        boxes.append(_box("stage", name, lines, done=name in record.artifacts, step=step))
    if record.stages and (record.recipe.get("output") or {}).get("merge", True):
        done = finished and record.merged is not None
        lines = [record.merged or ""]
        boxes.append(_box("model", "merged model", lines, done=done, step="merge"))
    return boxes


def _box(kind: str, title: str, lines: list[str], *, done: bool, step: str = "") -> dict[str, Any]:
    """A box of the chain; `step` is what leads to it from the box before."""
    shown = [line for line in lines if line]
    return {"kind": kind, "title": title, "lines": shown, "done": done, "step": step}


def _method_text(method: dict[str, Any]) -> str:
    kind = str(method.get("kind", ""))
    title = TRAITS[kind].title if kind in TRAITS else kind
    return f"{title}, r = {method['r']}" if method.get("r") else title


def _stage(record: RunRecord, name: str) -> dict[str, Any]:
    lines = record.metrics.get(name, [])
    return {
        "name": name,
        "facts": _facts(record.artifacts.get(name, {}), lines),
        "plot": plots.plot_stage(lines, record.losses_around(name)),
        "sources": _source_rows(lines),
        "alerts": find_alerts(lines),
        "skipped": [line for line in lines if "skipped" in line][:MAX_SKIPPED],
    }


def _facts(artifact: dict[str, Any], lines: MetricLines) -> list[tuple[str, str]]:
    """Figures of a stage by name: from the lineage if it has them, else from the metrics."""
    steps = artifact.get("steps") or max((line["step"] for line in lines), default=0)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    speed = artifact.get("tokens_per_second") or (median(speeds) if speeds else None)
    memory = artifact.get("peak_memory_bytes") or max(
        (line.get("peak_memory_bytes") or 0 for line in lines), default=0
    )
    trained, total = artifact.get("trainable_parameters"), artifact.get("total_parameters")
    share = ""
    if trained and total:
        share = f"{count(trained)} of {count(total)} parameters ({100 * trained / total:.2g} %)"
    facts = [
        ("steps", str(steps)),
        ("used", describe_used(artifact) if artifact.get("used") else ""),
        ("tokens", count(sum(line.get("tokens") or 0 for line in lines))),
        ("time", duration(artifact["seconds"]) if artifact.get("seconds") else ""),
        ("tokens/s", _with_plan(speed, artifact.get("planned_tokens_per_second"), "{:.0f}".format)),
        ("MFU", _median_percent(lines, "mfu")),
        ("time spent on", _time_shares(lines)),
        ("peak memory", _with_plan(memory, artifact.get("planned_peak_bytes"), size)),
        ("trained", share),
    ]
    return [(name, value) for name, value in facts if value]


def _median_percent(lines: MetricLines, key: str) -> str:
    """The median of a metric that is a fraction, as a percentage."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{100 * median(values):.1f} %" if values else ""


def _time_shares(lines: MetricLines) -> str:
    """What the steps, evaluations and saves spent their time on, in percent, largest first."""
    totals: dict[str, float] = {}
    for line in lines:
        for name, seconds in (line.get("seconds") or {}).items():
            totals[name] = totals.get(name, 0.0) + (seconds or 0.0)
        if line.get("save_seconds"):
            totals["save"] = totals.get("save", 0.0) + line["save_seconds"]
    whole = sum(totals.values())
    shares = [(value / whole, name) for name, value in totals.items() if whole]
    texts = [f"{name} {100 * share:.1f} %" for share, name in sorted(shares, reverse=True)]
    communication = sum(line.get("communication_seconds") or 0.0 for line in lines)
    if communication and whole:
        texts.append(f"of it communication {100 * communication / whole:.1f} %")
    return ", ".join(texts)


def _with_plan(measured: float | None, planned: float | None, text: Callable[[float], str]) -> str:
    """A measured figure, and the planned one if there is one."""
    if not measured:
        return ""
    return f"{text(measured)} (plan {text(planned)})" if planned else text(measured)


def _source_rows(lines: MetricLines) -> list[dict[str, Any]]:
    """A table row for each of several sources.

    Losses are means over the target tokens of the first and of the last tenth of the steps.
    """
    steps = [line["sources"] for line in lines if isinstance(line.get("sources"), dict)]
    tenth = -(-len(steps) // 10)
    names = dict.fromkeys(name for step in steps for name in step)

    def total(name: str, key: str) -> str:
        return count(sum(step.get(name, {}).get(key) or 0 for step in steps))

    return [
        {
            "name": name,
            "sequences": total(name, "sequences"),
            "tokens": total(name, "tokens"),
            "first_loss": _mean_loss(steps[:tenth], name),
            "last_loss": _mean_loss(steps[-tenth:], name),
        }
        for name in names
    ]


def _mean_loss(steps: MetricLines, name: str) -> float | None:
    measured = [step[name] for step in steps if (step.get(name) or {}).get("loss") is not None]
    targets = sum(source["supervised_tokens"] for source in measured)
    total = sum(source["loss"] * source["supervised_tokens"] for source in measured)
    return total / targets if targets else None
