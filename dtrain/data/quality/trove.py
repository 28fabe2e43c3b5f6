"""Cleaning of corpora that no single machine holds, as a pipeline of datatrove.

Two passes over the rows, and datatrove's MinHash between them (its four steps, on disk):

    check    rows → checks of one row → OUT/work/checked, signatures      any number of tasks
    buckets  signatures → pairs that are alike                            a task for each bucket
    cluster  pairs → all but the first of each group                      one task
    rest     OUT/work/checked without those → OUT/rows                    as many as `check`

A task that was finished is not run again; one that was killed starts anew and overwrites its own
files. What goes is told in OUT/quarantine as `dtrain data clean` tells it. What only all rows or a
tokenizer show is left to `dtrain data scan` of what remains: `template`, `overlong`,
`inconsistent`. Unlike a scan, datatrove does not compare candidates: rows that share a bucket
count as alike, which nine of ten pairs do at a similarity of 0.8, and two of ten at 0.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig

from dtrain.config.schema import Clean, Source
from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed, write_sealed
from dtrain.core.folders import local_path
from dtrain.core.hashes import fingerprint
from dtrain.data.quality.clean import KEEP, actions
from dtrain.data.quality.kinds import BROKEN, EXACT, NEAR
from dtrain.data.quality.leaks import HeldOut
from dtrain.data.quality.scan import Input
from dtrain.data.quality.trove_blocks import (
    Check,
    Checked,
    Lines,
    Rows,
    Signatures,
    alike_line,
    carried_line,
    row_line,
    told_line,
)
from dtrain.data.sources import Part, kind_of

BUCKETS = MinhashConfig().num_buckets


def corpus(sources: list[Source]) -> list[Input]:
    """The files of sources that lie in folders, each file a part; nothing is hashed or opened.

    Raises:
        UserError: a source has no file that can be read, or no `format` that says what it holds.
    """
    return [_input(source) for source in sources]


def _input(source: Source) -> Input:
    path = local_path(source.path)
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    found = found or sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
    inside = path.resolve()
    if path.is_dir():  # whoever can write into it must not choose what is read elsewhere
        found = [file for file in found if file.resolve().is_relative_to(inside)]
    parts = [Part(str(f), kind_of(f), "", f) for f in found if kind_of(f) and f.is_file()]
    if not parts:
        raise UserError("no file here that can be read", where=source.path, fix="correct `path`")
    if source.format == "auto":
        fix = "name `format`: a task that looks by itself may find another than its neighbour"
        raise UserError("the format of a corpus must be named", where=source.path, fix=fix)
    columns: dict[Any, str] = dict(source.columns)
    return Input(source.path, parts, source.format, columns)


@dataclass(frozen=True)
class Step:
    """One job of the pipeline: datatrove's blocks, and how many tasks share them."""

    name: str
    blocks: list[Any]
    tasks: int


def steps(
    inputs: list[Input], policy: Clean, known: HeldOut | None, out: Path, tasks: int
) -> list[Step]:
    """The jobs, each to be run when the one before is finished.

    Args:
        tasks: that share the files; a file is read by one task alone.
    """
    work, away = out / "work", out / "quarantine"
    what = actions(policy)
    check = [
        Rows(inputs, what[BROKEN], Lines(away, "broken-{rank:05d}", told_line)),
        Check(what, known, Lines(away, "check-{rank:05d}", told_line)),
        Lines(work / "checked", "{rank:05d}", carried_line),
    ]
    rest: list[Any] = [Checked(work / "checked")]
    between: list[Step] = []
    kind = NEAR if what[NEAR] != KEEP else EXACT
    if what[kind] != KEEP:
        config = MinhashConfig(num_buckets=BUCKETS)
        signatures, pairs, gone = (str(work / n) for n in ("signatures", "pairs", "gone"))
        check.append(Signatures(signatures, config, whole=kind == EXACT))
        blocks = MinhashDedupBuckets(signatures, pairs, config=config)
        between = [
            Step("buckets", [blocks], BUCKETS),
            Step("cluster", [MinhashDedupCluster(pairs, gone, config=config)], 1),
        ]
        told = partial(alike_line, kind, what[kind])
        rest.append(MinhashDedupFilter(gone, Lines(away, "alike-{rank:05d}", told)))
    rest.append(Lines(out / "rows", "source-{source}/{rank:05d}", row_line))
    return [Step("check", check, tasks), *between, Step("rest", rest, tasks)]


def settle(inputs: list[Input], policy: Clean, out: Path, tasks: int) -> None:
    """Note what the folder is made of: datatrove skips finished tasks, whatever they did.

    Raises:
        UserError: it was begun with other files, another policy or other tasks.
    """
    files = [[p.name, p.path and p.path.stat().st_size] for one in inputs for p in one.parts]
    settings = {"files": fingerprint(files), "policy": policy.model_dump(), "tasks": tasks}
    path = out / "corpus.json"
    if not path.exists():
        write_sealed(path, settings)
        return
    known = read_sealed(path)
    if changed := [name for name, value in settings.items() if known.get(name) != value]:
        what = f"was begun with other {', '.join(changed)}"
        raise UserError(what, where=str(out), fix="choose another folder, or go back to that")
