"""Where a base model lies on this machine."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from dtrain.core.cache_paths import local_path, sample_name
from dtrain.core.errors import UserError

# Weights from safetensors only, never a pickle; code only comes along as text.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
WHERE = "model.base"


def base_folder(base: str) -> Path:
    """The folder of a base model: a sample's, a local one, else a hub id's snapshot.

    A hub id is downloaded at its first use; of several processes on a machine one downloads and
    the others wait on the hub client's own file locks.

    Raises:
        UserError: there is no such sample, folder or hub id, or the hub cannot be reached.
    """
    path = local_path(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json, so it is not a model", where=WHERE)
        return path
    if sample_name(base) is not None:
        raise UserError(f"the sample {base!r} is not made yet", where=WHERE)
    if base.startswith(("/", ".", "~")) or base.count("/") > 1:
        raise UserError(f"there is no folder {path}", where=WHERE)
    return _download(base)


def _download(base: str) -> Path:
    try:
        return Path(snapshot_download(base, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise UserError(
            f"{base!r} is neither a folder nor a hub id", where=WHERE, fix="owner/name, or a path"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{base!r} needs its owner's permission",
            where=WHERE,
            fix="accept its licence on the hub, then log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"no folder and no hub model {base!r}", where=WHERE) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{base!r} is no folder here, and it cannot be fetched from the hub "
            f"({type(error).__name__})",
            where=WHERE,
            fix="give the path of a folder, or fetch the model where the hub can be reached "
            f"(`hf download {base}`) into a cache that this machine sees (HF_HOME)",
        ) from error
