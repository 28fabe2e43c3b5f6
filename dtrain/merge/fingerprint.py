"""What a model is, as one hash."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dtrain.core.hashes import file_sha256, fingerprint
from dtrain.core.known_hashes import sha256_of
from dtrain.core.log import progress
from dtrain.models.weights import weight_files


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
            hashes.append(sha256_of(path))
            bar.advance()
    return combine(hashes, folder)


def combine(hashes: Iterable[str], folder: Path) -> str:
    """The fingerprint from the SHA-256 of each weight file and the folder's config."""
    return fingerprint({"weights": sorted(hashes), "config": file_sha256(folder / "config.json")})
