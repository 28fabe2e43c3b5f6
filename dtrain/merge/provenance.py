"""What a run folder says of an adapter: which stage trained it, over what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoints.file_names import step_of
from dtrain.checkpoints.manifest import MANIFEST
from dtrain.config.load import load_recipe
from dtrain.config.methods import TRAITS
from dtrain.core.errors import UserError
from dtrain.core.files import read_json, read_sealed
from dtrain.core.hash_cache import cached_hash
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import progress
from dtrain.core.run_dir import RunDir, StageDir
from dtrain.models.peft_format import COMBINED
from dtrain.models.peft_format import origin as combined_origin
from dtrain.models.weight_files import weight_files


@dataclass(frozen=True)
class Origin:
    """The stage that trained something.

    Attributes:
        identity: of the stage.
        parent: identity of the stage before it, or the fingerprint of the run's base.
        quantised: whether it was trained over a base in NF4.
        dtype: that the base was loaded in, as torch calls it, or the recipe's word; None: not
            known, of adapters combined into one.
        method: the recipe's settings of the method.
        run: the run's folder, where its recipe lies.
    """

    identity: str
    parent: str
    quantised: bool
    dtype: str | None
    method: dict[str, Any]
    run: Path

    def trusts_code(self) -> bool:
        """Whether the run's recipe lets its base bring Python code."""
        recipe = RunDir(self.run).recipe
        return recipe.is_file() and load_recipe(str(recipe)).model.trust_remote_code


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of a run's checkpoints."""
    return step_of(folder) is not None and (folder / MANIFEST).is_file()


def origin_of(stage: Path) -> Origin | None:
    """What the record of a stage's folder says; None if there is none.

    Raises:
        UserError: the record was changed.
    """
    if not StageDir(stage).record.is_file():
        return None
    record = read_sealed(StageDir(stage).record)
    dtype = record.get("facts", {}).get("dtype", record["inputs"]["dtype"])
    return origin_from(record["inputs"], record["identity"], dtype, stage.parent)


def adapter_origin(folder: Path) -> Origin | None:
    """What an adapter's own folder, or that of its stage, says; None if nothing does.

    Raises:
        UserError: the record was changed.
    """
    if not (folder / COMBINED).is_file():
        return origin_of(folder.resolve().parent)
    found = combined_origin(folder)
    if found.identity is None or found.parent is None:
        return None
    run = folder.resolve().parent
    return Origin(found.identity, found.parent, found.quantised, None, {}, run)


def origin_from(inputs: dict[str, Any], identity: str, dtype: str, run: Path) -> Origin:
    """The same from what a checkpoint says it was made from."""
    method = inputs["method"]
    quantized = TRAITS[method["kind"]].quantizes_base
    return Origin(identity, inputs["parent"], quantized, dtype, method, run)


def known_bases(base: Path, origins: Sequence[Origin | None], manifest: str) -> list[str]:
    """Fingerprints of which a base must have one, if adapters are put on it one after another.

    Args:
        manifest: name of the file in which a merge says what it was made from.

    Returns:
        None of them if nothing is known of the adapters, or all is known to be right already.

    Raises:
        UserError: an adapter was trained over something else than the ones before it give.
    """
    made = read_json(base / manifest) if (base / manifest).is_file() else {}
    first = next((origin for origin in origins if origin is not None), None)
    if first is None:
        return []
    before = {first.parent}
    for origin in origins:
        if origin is not None and origin.parent not in before:
            raise UserError(
                f"stage {origin.identity[:12]} was trained over {origin.parent[:12]}, which is "
                f"none of the adapters before it",
                where="merge",
                fix="give the adapters in the order they were trained in",
            )
        before |= {origin.identity} if origin else set()
    return [] if first.parent in (made.get("source"), made.get("result")) else [first.parent]


def model_fingerprint(folder: Path) -> str:
    """Hash of a model's weights and config, whatever the folder's and the shards' names.

    Weights are read at the first call on a machine, half a second a gigabyte, or when they changed.

    Raises:
        UserError: no safetensors weights.
    """
    files = weight_files(folder)
    hashes = []
    with progress(f"hashing {folder.name}", len(files)) as bar:
        for path in files:
            hashes.append(cached_hash(path))
            bar.advance()
    return combine(hashes, folder)


def combine(hashes: Iterable[str], folder: Path) -> str:
    """The fingerprint from the hash of each weight file and the folder's config."""
    return fingerprint({"weights": sorted(hashes), "config": file_hash(folder / "config.json")})
