"""Finds a base model on this machine, or downloads it from the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dtrain.core.cache_paths import hub_snapshot, local_path, sample_name
from dtrain.core.errors import UserError
from dtrain.core.weight_files import undownloaded
from dtrain.planning.known_models import fetch_command

# Weights only as safetensors, never pickles; code is downloaded but not run. The last three say
# under which license a merged model stands.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]
PATTERNS += ["README.md", "LICENSE*", "NOTICE*"]
WHERE = "model.base"


def base_folder(base: str, where: str = WHERE, revision: str | None = None) -> Path:
    """The folder of a base model: a sample, a local folder, or the snapshot of a hub id.

    A hub id is downloaded at its first use; later its copy in the cache is used as it is. Of
    several processes on a machine one downloads; the others wait for the hub client's file lock.

    Args:
        where: key of the recipe, for errors.
        revision: branch, tag or commit of a hub id; None for its main branch.

    Raises:
        UserError: no such sample, folder or hub id, or the hub cannot be reached.
    """
    path = local_path(base)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json, so it is not a model", where=where)
        return path
    if sample_name(base) is not None:
        raise UserError(f"the sample {base!r} has not been built yet", where=where)
    if base.startswith(("/", ".", "~")) or base.count("/") > 1:
        raise UserError(f"there is no folder {path}", where=where)
    snapshot = hub_snapshot(base, revision)
    if snapshot is not None and not undownloaded(base, revision):
        return snapshot  # without asking the hub, which nodes may not reach
    return download(base, where, revision)


def download(base: str, where: str, revision: str | None = None) -> Path:
    """Download the files of a hub id that are not in the cache; return its folder there.

    A download that was interrupted continues. HF_TOKEN, or `hf auth login`, opens gated models.

    Raises:
        UserError: as `base_folder`, or the revision does not exist.
    """
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise UserError(
            f"{base!r} is neither a folder nor a hub id", where=where, fix="owner/name, or a path"
        ) from error
    except GatedRepoError as error:
        raise UserError(
            f"{base!r} needs its owner's permission",
            where=where,
            fix="accept its license on the hub, then log in with `hf auth login`",
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no folder and no hub model {base!r}",
            where=where,
            fix="correct the name; of a private model, set HF_TOKEN",
        ) from error
    except (OSError, ValueError) as error:
        if RevisionNotFoundError in (type(error), type(error.__cause__)):
            raise UserError(f"{base} has no revision {revision!r}", where=where) from error
        raise UserError(
            f"{base!r} is not a local folder and cannot be downloaded from the hub "
            f"({type(error).__name__})",
            where=where,
            fix=f"give the path of a folder, or run `{fetch_command(base, revision)}` on a machine "
            "that reaches the hub, into a cache that this one reads (HF_HOME)",
        ) from error
    if problem := undownloaded(base, revision):  # without a network the client returns what it has
        raise UserError(problem, where=where, fix=f"run `{fetch_command(base, revision)}` again")
    return folder
