"""Checks a model's files in one pass: hashes, finite values, and the index."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from blake3 import blake3

from dtrain.core.errors import UserError
from dtrain.core.files import read_object
from dtrain.core.hashes import file_hash
from dtrain.core.log import progress
from dtrain.core.stage_dir import MERGE_MANIFEST, read_merge_manifest
from dtrain.core.weight_files import INDEX, read_header, read_weight_map, weight_files
from dtrain.distributed.tensor_utils import all_finite
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.merge import FORMAT
from dtrain.models.peft_format import WEIGHTS
from dtrain.models.stored_tensors import (
    BLOCK_ELEMENTS,
    FLOAT_DTYPES,
    DecodedTensor,
    ModelTensors,
    StoredTensor,
    row_blocks,
    stored_tensors,
)

RAW_BYTES = 1 << 22  # at once, of a tensor whose values are not checked


@dataclass
class VerifyReport:
    """The result of a check.

    Attributes:
        hashed: number of files that the manifest has a hash of.
        problems: sentences, each starting with the file or tensor that it is about.
    """

    tensors: int = 0
    bytes: int = 0
    hashed: int = 0
    problems: list[str] = field(default_factory=list)


def verify_model(folder: Path) -> VerifyReport:
    """Hash every file that the manifest lists, and check every value, in one pass.

    A folder without merge.json (an original base, an adapter) has no hashes to compare with. Of a
    model, also that its tensors are those of its config.json, as `BaseTensors.check_complete`.

    Raises:
        UserError: there are no weights, a file is not a complete safetensors file, or an older
            dtrain wrote the manifest.
    """
    report, manifest = VerifyReport(), folder / MERGE_MANIFEST
    hashes = _manifest_hashes(manifest) if manifest.is_file() else {}
    files = model_files(folder)
    with progress(f"verifying {folder.name}", len(files)) as bar:
        for path in files:
            _verify_weights(path, hashes.pop(path.name, None), report)
            bar.advance()
    _check_index(folder, report)
    _verify_decoded(folder, report)
    if not (folder / WEIGHTS).is_file():
        _check_complete(folder, report)
    for name, digest in hashes.items():
        if not (folder / name).is_file():
            report.problems.append(f"{name}: is missing")
        elif file_hash(folder / name) != digest:
            report.problems.append(f"{name}: was changed after it was written")
        report.hashed += 1
    return report


def model_files(folder: Path) -> list[Path]:
    """Return the weight files of a model, or of an adapter."""
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else weight_files(folder)


def model_tensors(folder: Path) -> dict[str, StoredTensor | DecodedTensor]:
    """Return the tensors of a model, or of an adapter."""
    if (folder / WEIGHTS).is_file():
        return dict(stored_tensors(folder / WEIGHTS))
    return dict(ModelTensors(folder))


def _verify_weights(path: Path, digest: str | None, report: VerifyReport) -> None:
    hasher = blake3(read_header(path)[1])
    for name, tensor in stored_tensors(path).items():
        finite, dtype = True, FLOAT_DTYPES.get(tensor.dtype)
        for data in tensor.raw(BLOCK_ELEMENTS * dtype.itemsize if dtype else RAW_BYTES):
            hasher.update(data)
            if dtype:
                finite &= all_finite(torch.frombuffer(data, dtype=dtype))
        if not finite:
            report.problems.append(f"{path.name}: {name} contains NaN or infinity")
        report.tensors += 1
    report.bytes += path.stat().st_size
    if digest is not None:
        report.hashed += 1
        if hasher.hexdigest() != digest:
            report.problems.append(f"{path.name}: was changed after it was written")


def _verify_decoded(folder: Path, report: VerifyReport) -> None:
    """Check the values of what is stored as codes and scales."""
    for name, tensor in model_tensors(folder).items():
        if isinstance(tensor, DecodedTensor):
            rows = row_blocks(tensor.shape)
            if not all([all_finite(tensor.rows(*block)) for block in rows]):
                report.problems.append(f"{tensor.path.name}: {name} contains NaN or infinity")


def _check_complete(folder: Path, report: VerifyReport) -> None:
    """Check that the tensors are those of the model that config.json describes."""
    try:
        BaseTensors(folder).check_complete()
    except UserError as error:
        report.problems.append(error.message)


def _check_index(folder: Path, report: VerifyReport) -> None:
    """Check that the index lists every tensor with the file that contains it."""
    index = folder / INDEX
    if not index.is_file() or (folder / WEIGHTS).is_file():
        return
    listed = read_weight_map(index)
    stored = {name: path.name for path in model_files(folder) for name in read_header(path)[0]}
    for name in sorted(listed.keys() | stored.keys()):
        if listed.get(name) != stored.get(name):
            message = f"the index says {listed.get(name)}, but it is in {stored.get(name)}"
            report.problems.append(f"{name}: {message}")


def _manifest_hashes(manifest: Path) -> dict[str, str]:
    written = read_object(manifest).get("format")
    if written != FORMAT:
        raise UserError(
            f"has format {written}, not {FORMAT}: an older dtrain wrote it",
            where=str(manifest),
            fix="merge again, or verify with the version that wrote it",
        )
    files = read_merge_manifest(manifest.parent, "files")["files"]
    return {name: digest for name, digest in files.items() if Path(name).name == name}
