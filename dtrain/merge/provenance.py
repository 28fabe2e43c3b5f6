"""What a run folder records about an adapter: which stage trained it, and on which model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.config.load import load_recipe
from dtrain.config.methods import MethodTraits, parse_method
from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed
from dtrain.core.hash_cache import cached_hash
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import progress
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import MERGE_MANIFEST, StageDir, read_merge_manifest
from dtrain.core.weight_files import weight_files
from dtrain.models.peft_format import COMBINED, read_adapter_origin


@dataclass(frozen=True)
class TrainingOrigin:
    """The stage that trained an adapter or a model.

    Attributes:
        identity: of the stage.
        parent: identity of the stage before it, or the fingerprint of the run's base.
        base_in_nf4: whether it was trained on a base in NF4.
        dtype: that the base was loaded in, as torch or the recipe calls it; None: not known, for
            adapters combined into one.
        method: the recipe's settings of the method; empty if not known.
        run: the run's folder, with its recipe.
    """

    identity: str
    parent: str
    base_in_nf4: bool
    dtype: str | None
    method: dict[str, Any]
    run: Path

    @property
    def traits(self) -> MethodTraits:
        """The traits of the method."""
        return parse_method(self.method).traits

    def trusts_remote_code(self) -> bool:
        """Return whether the run's recipe allows Python code that comes with the base."""
        recipe = RunDir(self.run).recipe
        return recipe.is_file() and load_recipe(str(recipe)).model.trust_remote_code


def stage_origin(stage: Path) -> TrainingOrigin | None:
    """Return what the record in a stage's folder says; None if there is none.

    Raises:
        UserError: the record was changed.
    """
    path = StageDir(stage).record
    if not path.is_file():
        return None
    record = read_sealed(path)
    dtype = record.get("facts", {}).get("dtype", record["inputs"]["dtype"])
    return origin_from_inputs(record["inputs"], record["identity"], dtype, stage.parent)


def adapter_origin(folder: Path) -> TrainingOrigin | None:
    """Return what an adapter's folder, or its stage's, says; None if nothing is recorded.

    Raises:
        UserError: the record was changed.
    """
    if not (folder / COMBINED).is_file():
        return stage_origin(folder.resolve().parent)
    origin = read_adapter_origin(folder)
    if origin.identity is None or origin.parent is None:
        return None
    run = folder.resolve().parent
    return TrainingOrigin(origin.identity, origin.parent, origin.base_in_nf4, None, {}, run)


def origin_from_inputs(
    inputs: dict[str, Any], identity: str, dtype: str, run: Path
) -> TrainingOrigin:
    """Return the origin that a stage's recorded inputs describe."""
    method = inputs["method"]
    in_nf4 = parse_method(method).traits.quantizes_base
    return TrainingOrigin(identity, inputs["parent"], in_nf4, dtype, method, run)


def expected_bases(base: Path, origins: Sequence[TrainingOrigin | None]) -> list[str]:
    """Return the fingerprints that a base may have if adapters are added in this order.

    Returns:
        An empty list if the origin of the adapters is unknown, or the base is known to be right.

    Raises:
        UserError: an adapter was trained on something else than the adapters before it produce.
    """
    record = read_merge_manifest(base) if (base / MERGE_MANIFEST).is_file() else {}
    first = next((origin for origin in origins if origin is not None), None)
    if first is None:
        return []
    parents = {first.parent}
    for origin in origins:
        if origin is not None and origin.parent not in parents:
            raise UserError(
                f"stage {origin.identity[:12]} was trained on {origin.parent[:12]}, which is none "
                "of the adapters before it",
                where="merge",
                fix="give the adapters in the order in which they were trained",
            )
        parents |= {origin.identity} if origin else set()
    return [] if first.parent in (record.get("source"), record.get("result")) else [first.parent]


def model_fingerprint(folder: Path) -> str:
    """Return a hash of a model's weights and config, independent of folder and shard names.

    Weights are read at the first call on a machine, or after they changed.

    Raises:
        UserError: no safetensors weights.
    """
    files = weight_files(folder)
    hashes = []
    with progress(f"hashing {folder.name}", len(files)) as bar:
        for path in files:
            hashes.append(cached_hash(path))
            bar.advance()
    return combined_fingerprint(hashes, folder)


def combined_fingerprint(hashes: Iterable[str], folder: Path) -> str:
    """Return the fingerprint for the hashes of the weight files and the folder's config."""
    return fingerprint({"weights": sorted(hashes), "config": file_hash(folder / "config.json")})
