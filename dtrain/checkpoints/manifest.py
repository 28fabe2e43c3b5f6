"""The manifest: what a checkpoint holds, which file has which range, and every file's hash.

It is written last, and carries a hash of itself. A folder without a valid one is no checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dtrain.checkpoints.parameter_shards import NEUTRAL_KINDS, elements
from dtrain.core.errors import UserError
from dtrain.core.ownership import Untrusted

FORMAT = 3
MANIFEST = "manifest.json"
FILE_PATTERN = r"^rank-\d{5,}\.safetensors$"  # no way out of the folder

Natural = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=FILE_PATTERN)]


class Part(BaseModel):
    """A part of the manifest; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Kind(Part):
    """One kind of one parameter: where its ranges lie, as (start, stop, file)."""

    dtype: str
    slices: list[tuple[Natural, Natural, FileName]]


class Parameter(Part):
    """One parameter: its global shape, and what was saved of it."""

    shape: list[Natural]
    kinds: dict[str, Kind]


PARAMETERS = TypeAdapter(dict[str, Parameter])


class File(Part):
    """One file beside the manifest."""

    bytes: Natural
    blake3: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(Part):
    """What one rank wrote; `held` is its parameters as JSON, the same text at every save."""

    rank: Natural
    files: dict[FileName, File]
    held: str


class Manifest(Part):
    """What all ranks wrote, and the caller's state."""

    format: int = FORMAT
    step: Natural
    state: dict[str, Any]
    files: dict[FileName, File]
    parameters: dict[str, Parameter]

    def render(self) -> str:
        """The manifest as text; its last field is the BLAKE3 hash of the text before it."""
        body = self.model_dump_json()
        return body[:-1] + _seal(body.encode()).decode()


def _seal(body: bytes) -> bytes:
    return b',"blake3":"%s"}\n' % blake3(body).hexdigest().encode()


def parse(path: Path) -> Manifest:
    """Read a manifest and check all that can be checked without reading the shards.

    Raises:
        Untrusted: another version of dtrain wrote it, or it is not a manifest of ours.
        UserError: it is missing, changed, or does not cover its parameters.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"no valid manifest: {error!r}", where=str(path)) from error
    head = text[: -len(_seal(b""))]
    if not text or head + _seal(head + b"}") != text:
        _check_not_older(text, path)
        raise UserError("the manifest was changed after it was written", where=str(path))
    return _validated(head + b"}", path)


def _check_not_older(text: bytes, path: Path) -> None:
    """Formats 1 and 2 carry a SHA-256: such a checkpoint is not skipped as a broken one."""
    with suppress(ValueError, RecursionError):
        body = json.loads(text)
        if isinstance(body, dict) and "sha256" in body and body.get("format") in (1, 2):
            _refuse_format(body["format"], path)


def _refuse_format(found: object, path: Path) -> NoReturn:
    older = isinstance(found, int) and found < FORMAT
    raise Untrusted(
        f"the checkpoint has format {found}, this dtrain reads {FORMAT}",
        where=str(path),
        fix="it was written by an older dtrain: finish the stage with that version, or start again "
        "in a new folder"
        if older
        else "resume with the dtrain version that wrote it",
    )


@lru_cache(maxsize=16)  # after each save the same few are looked at to see which may go
def _validated(text: bytes, path: Path) -> Manifest:
    body = json.loads(text)
    if body.get("format") != FORMAT:
        _refuse_format(body.get("format"), path)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise Untrusted(f"not a manifest of dtrain: {error}", where=str(path)) from error
    if problems := cover_problems(manifest.parameters):
        raise Untrusted("; ".join(problems[:5]), where=str(path))
    return manifest


def merge_records(records: Iterable[Record], step: int, state: dict[str, Any]) -> Manifest:
    """Join what the ranks wrote; slices come out sorted by start.

    Raises:
        RuntimeError: ranks disagree, or leave a hole or an overlap: a defect of the engine.
    """
    records = sorted(records, key=lambda record: record.rank)
    files = {name: file for record in records for name, file in record.files.items()}
    parameters = _merge(tuple(record.held for record in records))
    return Manifest(step=step, state=state, files=files, parameters=parameters)


@lru_cache(maxsize=1)  # from save to save nothing of it changes
def _merge(held: tuple[str, ...]) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for text in held:
        for name, theirs in PARAMETERS.validate_json(text).items():
            ours = parameters.setdefault(name, Parameter(shape=theirs.shape, kinds={}))
            _join(name, ours, theirs)
    for parameter in parameters.values():
        for kind in parameter.kinds.values():
            kind.slices.sort()
    if problems := cover_problems(parameters):
        raise RuntimeError("checkpoint pieces do not fit: " + "; ".join(problems[:5]))
    return parameters


def _join(name: str, ours: Parameter, theirs: Parameter) -> None:
    if ours.shape != theirs.shape:
        raise RuntimeError(f"ranks disagree on {name}: {ours.shape} and {theirs.shape}")
    for kind_name, kind in theirs.kinds.items():
        mine = ours.kinds.setdefault(kind_name, Kind(dtype=kind.dtype, slices=[]))
        if mine.dtype != kind.dtype:
            raise RuntimeError(f"ranks disagree on {name} {kind_name}: {mine.dtype}, {kind.dtype}")
        mine.slices.extend(kind.slices)


def cover_problems(parameters: dict[str, Parameter]) -> list[str]:
    """Holes and overlaps in the ranges of each parameter, as sentences; none if all is well."""
    problems = [] if parameters else ["there is not one parameter"]
    for name, parameter in parameters.items():
        total = elements(parameter.shape)
        if "weight" not in parameter.kinds and total:
            problems.append(f"{name}: no weight was saved")
        for kind_name, kind in parameter.kinds.items():
            whole = kind_name in NEUTRAL_KINDS
            problems += [f"{name} {kind_name}: {p}" for p in _range_problems(kind, total, whole)]
    return problems


def _range_problems(kind: Kind, total: int, whole: bool) -> list[str]:
    problems, reached = [], 0
    for start, stop, file in kind.slices:
        if start < reached:
            problems.append(f"elements from {start} stand twice, once in {file}")
        if (start > reached and whole) or not start < stop <= total:
            problems.append(f"elements {reached} to {start} are missing, or {stop} is too far")
        reached = max(reached, stop)
    if whole and reached < total:
        problems.append(f"elements {reached} to {total} are missing")
    return problems
