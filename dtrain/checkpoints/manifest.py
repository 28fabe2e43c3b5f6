"""The files of a checkpoint, and its manifest: which file has which range, and every file's hash.

The manifest is written last, and carries a hash of itself. A folder without a valid one is not a
checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dtrain.checkpoints.parameter_shards import NEUTRAL_KINDS, elements
from dtrain.core.errors import UserError
from dtrain.core.files import parse_json
from dtrain.core.ownership import Untrusted

FORMAT = 3
FILE_PATTERN = r"^rank-\d{5,}\.safetensors$"  # no way out of the folder

Natural = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=FILE_PATTERN)]
REMOVED_PREFIX = ".removed."
_STEP = re.compile(r"step-(\d{6,})")
_WORK = re.compile(r"\.step-(\d{6,})\..+")


def step_name(step: int) -> str:
    """Return the folder name of a complete checkpoint."""
    return f"step-{step:06d}"


def work_name(step: int, attempt: str) -> str:
    """Return the folder name of a checkpoint that is being written."""
    return f".{step_name(step)}.{attempt}"


def shard_name(rank: int) -> str:
    """Return the file name of one rank's tensors."""
    return f"rank-{rank:05d}.safetensors"


def record_name(rank: int) -> str:
    """Return the file name of what one rank wrote; removed once there is a manifest."""
    return f"rank-{rank:05d}.json"


def failed_name(rank: int) -> str:
    """Return the file name in which a rank reports to rank 0 why it could not save."""
    return f"rank-{rank:05d}.failed"


def step_of(folder: Path) -> int | None:
    """Return the step of a complete checkpoint's folder name; None for any other folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def unfinished_step_of(folder: Path) -> int | None:
    """Return the step of an unfinished save's folder name; None for any other folder."""
    match = _WORK.fullmatch(folder.name)
    return int(match[1]) if match else None


class ManifestModel(BaseModel):
    """Base of the manifest's models; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class SavedKind(ManifestModel):
    """One kind of one parameter: its ranges, as (start, stop, file)."""

    dtype: str
    slices: list[tuple[Natural, Natural, FileName]]


class SavedParameter(ManifestModel):
    """One parameter: its global shape, and the kinds that were saved of it."""

    shape: list[Natural]
    kinds: dict[str, SavedKind]


PARAMETERS = TypeAdapter(dict[str, SavedParameter])


class ShardFileInfo(ManifestModel):
    """Size and hash of one file."""

    bytes: Natural
    blake3: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RankRecord(ManifestModel):
    """What one rank wrote; `parameters` is JSON, the same text at every save."""

    rank: Natural
    files: dict[FileName, ShardFileInfo]
    parameters: str


class Manifest(ManifestModel):
    """What all ranks wrote, and the state of the run."""

    format: int = FORMAT
    step: Natural
    state: dict[str, Any]
    files: dict[FileName, ShardFileInfo]
    parameters: dict[str, SavedParameter]

    def render(self) -> str:
        """The manifest as text; its last field is the BLAKE3 hash of the text before it."""
        body = self.model_dump_json()
        return body[:-1] + _seal(body.encode()).decode()


def _seal(body: bytes) -> bytes:
    return b',"blake3":"%s"}\n' % blake3(body).hexdigest().encode()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check everything that needs no reading of the shards.

    Raises:
        Untrusted: another version of dtrain wrote it, or it is not a manifest of dtrain.
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


def _refuse_format(version: object, path: Path) -> NoReturn:
    older = isinstance(version, int) and version < FORMAT
    raise Untrusted(
        f"the checkpoint has format {version}, this dtrain reads {FORMAT}",
        where=str(path),
        fix="it was written by an older dtrain: finish the stage with that version, or start again "
        "in a new folder"
        if older
        else "resume with the dtrain version that wrote it",
    )


@lru_cache(maxsize=16)  # each save reads the same few again to decide which to remove
def _validated(text: bytes, path: Path) -> Manifest:
    body = parse_json(text, str(path))
    if not isinstance(body, dict):
        raise Untrusted("not a manifest of dtrain", where=str(path))
    if body.get("format") != FORMAT:
        _refuse_format(body.get("format"), path)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise Untrusted(f"not a manifest of dtrain: {error}", where=str(path)) from error
    if problems := coverage_problems(manifest.parameters):
        raise Untrusted("; ".join(problems[:5]), where=str(path))
    return manifest


def merge_rank_records(records: Iterable[RankRecord], step: int, state: dict[str, Any]) -> Manifest:
    """Merge what the ranks wrote, with slices sorted by start.

    Raises:
        RuntimeError: ranks disagree, or their ranges have a gap or overlap: an engine's defect.
    """
    records = sorted(records, key=lambda record: record.rank)
    files = {name: file for record in records for name, file in record.files.items()}
    parameters = _merge(tuple(record.parameters for record in records))
    return Manifest(step=step, state=state, files=files, parameters=parameters)


@lru_cache(maxsize=1)  # it is the same for every save
def _merge(texts: tuple[str, ...]) -> dict[str, SavedParameter]:
    parameters: dict[str, SavedParameter] = {}
    for text in texts:
        for name, theirs in PARAMETERS.validate_json(text).items():
            ours = parameters.setdefault(name, SavedParameter(shape=theirs.shape, kinds={}))
            _join(name, ours, theirs)
    for parameter in parameters.values():
        for kind in parameter.kinds.values():
            kind.slices.sort()
    if problems := coverage_problems(parameters):
        raise RuntimeError(
            "the ranks' parameter shards do not fit together: " + "; ".join(problems[:5])
        )
    return parameters


def _join(name: str, ours: SavedParameter, theirs: SavedParameter) -> None:
    if ours.shape != theirs.shape:
        raise RuntimeError(f"ranks disagree on {name}: {ours.shape} and {theirs.shape}")
    for kind_name, kind in theirs.kinds.items():
        mine = ours.kinds.setdefault(kind_name, SavedKind(dtype=kind.dtype, slices=[]))
        if mine.dtype != kind.dtype:
            raise RuntimeError(f"ranks disagree on {name} {kind_name}: {mine.dtype}, {kind.dtype}")
        mine.slices.extend(kind.slices)


def coverage_problems(parameters: dict[str, SavedParameter]) -> list[str]:
    """Return the gaps and overlaps in the ranges of each parameter, as sentences."""
    problems = [] if parameters else ["there are no parameters"]
    for name, parameter in parameters.items():
        total = elements(parameter.shape)
        if "weight" not in parameter.kinds and total:
            problems.append(f"{name}: no weight was saved")
        for kind_name, kind in parameter.kinds.items():
            whole = kind_name in NEUTRAL_KINDS
            problems += [f"{name} {kind_name}: {p}" for p in _range_problems(kind, total, whole)]
    return problems


def _range_problems(kind: SavedKind, total: int, whole: bool) -> list[str]:
    problems, reached = [], 0
    for start, stop, file in kind.slices:
        if start < reached:
            problems.append(f"elements from {start} were saved twice, once in {file}")
        if (start > reached and whole) or not start < stop <= total:
            problems.append(f"elements {reached} to {start} are missing, or {stop} is too far")
        reached = max(reached, stop)
    if whole and reached < total:
        problems.append(f"elements {reached} to {total} are missing")
    return problems
