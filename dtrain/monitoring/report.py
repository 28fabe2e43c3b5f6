"""The run's report: one HTML file a person likes to look at, and a summary for the terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined, Undefined

from dtrain.core.files import write_atomic
from dtrain.core.units import count, duration, size
from dtrain.monitoring.plots import curves
from dtrain.monitoring.record import Losses, Record, read_record

TEMPLATE = Path(__file__).with_name("report.html.jinja")
REPORT = "report.html"
SAME = 0.0005  # a difference that three decimals do not show
WIDTH = 100


def write_report(run: Path) -> Path:
    """Write report.html into the run folder, from whatever is there of the run yet.

    The file needs nothing beside it and nothing from outside; all text is escaped.
    """
    record = read_record(run)
    write_atomic(run / REPORT, render(record))
    return run / REPORT


def render(record: Record) -> str:
    """The report as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"loss": loss_text, "tone": tone, "short": short}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        record=record,
        state=state(record),
        headline=headline(record),
        chain=chain(record),
        stages=stage_views(record),
    )


def summary(run: Path) -> str:
    """What got better, as plain text for the terminal."""
    record = read_record(run)
    parts = [_loss_table(record), *_answer_blocks(record), _places(record)]
    return "\n\n".join(part for part in parts if part)


def loss_text(value: object) -> str:
    """A loss with three decimals, or a dash for one that was not measured."""
    return f"{value:.3f}" if isinstance(value, int | float) else "—"


def tone(change: float) -> str:
    """How a change of a loss is to be taken: better, worse or same."""
    if abs(change) < SAME:
        return "same"
    return "better" if change < 0 else "worse"


def short(identity: object) -> str:
    """The first twelve digits of a fingerprint."""
    return "—" if identity is None or isinstance(identity, Undefined) else str(identity)[:12]


def state(record: Record) -> dict[str, Any]:
    """How far the run has come, in words."""
    names = [str(stage["name"]) for stage in record.stages]
    done = [name for name in names if name in record.artefacts]
    if names and len(done) == len(names):
        return {"finished": True, "text": "finished"}
    if record.metrics or done:
        return {"finished": False, "text": f"{len(done)} of {len(names) or '?'} stages finished"}
    return {"finished": False, "text": "not begun"}


def headline(record: Record) -> str:
    """One line on what was run."""
    base = (record.recipe.get("model") or {}).get("base", "unknown base model")
    engine = (record.recipe.get("engine") or {}).get("kind")
    seconds = sum(a.get("seconds") or 0 for a in record.artefacts.values())
    parts = [
        str(base),
        f"{len(record.stages)} stages" if record.stages else "",
        f"engine {engine}" if engine else "",
        f"{duration(seconds)} of training" if seconds else "",
    ]
    return " · ".join(part for part in parts if part)


def chain(record: Record) -> list[dict[str, Any]]:
    """The boxes of the picture of the chain: base, each stage, the merged model."""
    base = str((record.recipe.get("model") or {}).get("base", "base"))
    links = [_link("model", base.split("/")[-1].removeprefix("dtrain:"), ["base model"], True, "")]
    merged_before = False
    for stage in record.stages:
        artefact = record.artefacts.get(str(stage["name"]))
        lines = [_kind(stage), _method(stage.get("method") or {})]
        links.append(
            _link(
                "stage",
                str(stage["name"]),
                lines,
                artefact is not None,
                "merge" if merged_before else "",
            )
        )
        merged_before = True
    if record.stages and (record.recipe.get("output") or {}).get("merge", True):
        done = state(record)["finished"] and record.merged is not None
        links.append(_link("model", "merged model", [record.merged or ""], done, "merge"))
    return links


def stage_views(record: Record) -> list[dict[str, Any]]:
    """What the report shows of each stage that has begun: facts, picture, skipped steps."""
    names = dict.fromkeys([*record.metrics, *record.artefacts])
    return [_stage_view(record, name) for name in names]


def _stage_view(record: Record, name: str) -> dict[str, Any]:
    lines = record.metrics.get(name, [])
    return {
        "name": name,
        "facts": _facts(record.artefacts.get(name, {}), lines),
        "picture": curves(lines),
        "skipped": [line for line in lines if "skipped" in line][:20],
    }


def _facts(artefact: dict[str, Any], lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and value of what is known of a stage: as the lineage says, else from its metrics."""
    steps = artefact.get("steps") or max((line["step"] for line in lines), default=0)
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    speed = artefact.get("tokens_per_second") or (median(speeds) if speeds else None)
    memory = artefact.get("peak_memory_bytes") or max(
        (line.get("peak_memory_bytes") or 0 for line in lines), default=0
    )
    trained, total = artefact.get("trainable_parameters"), artefact.get("total_parameters")
    facts = [
        ("steps", str(steps)),
        ("tokens", count(sum(line.get("tokens") or 0 for line in lines))),
        ("time", duration(artefact["seconds"]) if artefact.get("seconds") else ""),
        ("tokens/s", f"{speed:.0f}" if speed else ""),
        ("peak memory", size(memory) if memory else ""),
        (
            "trained",
            f"{count(trained)} of {count(total)} parameters ({100 * trained / total:.2g} %)"
            if trained and total
            else "",
        ),
    ]
    return [(name, value) for name, value in facts if value]


def _link(kind: str, title: str, lines: list[str], done: bool, how: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "title": title,
        "lines": [line for line in lines if line],
        "done": done,
        "how": how,
    }


def _kind(stage: dict[str, Any]) -> str:
    names = {"cpt": "continued pretraining", "sft": "supervised fine-tuning"}
    return names.get(str(stage.get("kind")), str(stage.get("kind", "")))


def _method(method: dict[str, Any]) -> str:
    names = {"lora": "LoRA", "qlora": "QLoRA", "full": "every parameter"}
    text = names.get(str(method.get("kind")), str(method.get("kind", "")))
    return f"{text}, r = {method['r']}" if method.get("r") else text


def _loss_table(record: Record) -> str:
    """Held-out losses by set and model, with the change from the base to the last."""
    if not record.losses:
        return "No held-out losses were measured."
    after = [f"after {name}" if i else name for i, name in enumerate(record.models)]
    rows = [["held-out loss", *after, "change", ""]]
    for losses in record.losses:
        values = [loss_text(losses.values.get(model)) for model in record.models]
        rows.append([losses.name, *values, *_change(losses)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_row(row, widths) for row in rows)


def _change(losses: Losses) -> tuple[str, str]:
    if losses.change is None or losses.percent is None:
        return "—", ""
    return f"{losses.change:+.3f} ({losses.percent:+.1f} %)", tone(losses.change)


def _row(cells: list[str], widths: list[int]) -> str:
    first, *middle, last = (
        cell.ljust(w) if i in (0, len(cells) - 1) else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    )
    return "   ".join([first, *middle, last]).rstrip()


def _answer_blocks(record: Record) -> list[str]:
    return [_answer_block(i, answer) for i, answer in enumerate(record.answers, 1)]


def _answer_block(number: int, answer: dict[str, Any]) -> str:
    says = [("documented", "reference"), ("base", "base"), ("final", "final")]
    lines = [_filled(f"{number}. ", str(answer.get("question", "")))]
    lines += [_filled(f"   {label:<11} ", str(answer.get(key) or "—")) for label, key in says]
    return "\n".join(lines)


def _filled(label: str, text: str) -> str:
    """`text` on lines of limited width, hanging under its label; control characters go."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return textwrap.fill(
        " ".join(plain.split()), WIDTH, initial_indent=label, subsequent_indent=" " * len(label)
    )


def _places(record: Record) -> str:
    places = [("merged model", record.merged), ("report", REPORT)]
    return "\n".join(f"{name:<14} {record.folder / place}" for name, place in places if place)
