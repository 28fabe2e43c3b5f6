"""Paths in dtrain's cache, which holds only what it can rebuild, and in the hub client's."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from dtrain.core.addresses import has_secret, secret_error, without_secret
from dtrain.core.errors import UserError
from dtrain.core.ownership import make_private_folder

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4096  # of Linux
MAX_SHOWN = 200  # characters of what is refused
SAMPLE_PREFIX = "dtrain:"
CACHE_VARIABLE = "DTRAIN_CACHE"
CHOOSE_CACHE = f"set {CACHE_VARIABLE} to a folder that you can write to"


def cache_folder() -> Path:
    """`$DTRAIN_CACHE`, else `$XDG_CACHE_HOME/dtrain`, else `~/.cache/dtrain`.

    In another user's folder where this one can write, too, each has a folder of their own: what is
    in a cache is trusted. One that cannot be written to is used as it is.

    Raises:
        UserError: none of them is set, and this user has no home folder.
    """
    folder = _configured()
    with suppress(OSError):
        if folder.stat().st_uid != os.geteuid() and os.access(folder, os.W_OK):
            return folder / f"user-{os.geteuid()}"
    return folder


def _configured() -> Path:
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).absolute()
    try:
        return (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dtrain"
        )
    except RuntimeError as error:  # no HOME, and no entry in the list of users
        message = "this user has no home folder, and no other for the cache is set"
        raise UserError(message, where=CACHE_VARIABLE, fix=CHOOSE_CACHE) from error


def compile_folder() -> Path:
    """Where libraries keep what they compile, which they want to write when they are imported.

    In the cache; where that cannot be written to, in a private folder among the temporary files.

    Raises:
        UserError: there is no cache, or another user made that folder.
    """
    folder = cache_folder()
    if _can_write(folder):
        return folder
    return make_private_folder(Path(tempfile.gettempdir()) / f"dtrain-{os.geteuid()}")


def computed_folder(name: str, stage: Path) -> Path:
    """Where a stage keeps what it computes of its start, and later runs can use.

    In the cache; where that cannot be written to, in the stage's folder. A later stage would
    otherwise end there, after hours.

    Args:
        name: of a folder in the cache.
        stage: the stage's folder in the run.
    """
    folder = cache_folder() / name
    return folder if _can_write(folder) else stage / ".cache" / name


def _can_write(folder: Path) -> bool:
    """Whether this user can write to a folder, or create it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)


def is_in_cache(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in the cache."""
    with suppress(UserError):
        return Path(path).absolute().is_relative_to(_configured())
    return False


def store_folder() -> Path:
    """Folder of prepared data, and of the source files that are downloaded for it."""
    return cache_folder() / "stores"


def sample_folder(name: str) -> Path:
    """Folder of the sample model or corpus `name`, which dtrain/samples/ builds."""
    return cache_folder() / "samples" / name


def sample_name(address: str) -> str | None:
    """'dtrain:python-docs/domain.jsonl' → 'python-docs'; None for any other address."""
    if not address.startswith(SAMPLE_PREFIX):
        return None
    return address.removeprefix(SAMPLE_PREFIX).split("/")[0]


def user_path(address: str | Path) -> Path:
    """A path that a person or a file gave, with `~` for a home folder.

    Raises:
        UserError: no file can have it: a name or the whole is too long, has a NUL or half a
            character, or `~` names no user. Or it is an address with a secret.
    """
    text = str(address)
    if has_secret(text):
        raise secret_error(without_secret(text))
    try:
        path = Path(text).expanduser()
        raw = os.fsencode(path.absolute())
    except (RuntimeError, UnicodeError) as error:
        raise UserError(f"is not a path: {error}", where=ascii(text)[:MAX_SHOWN]) from error
    if len(raw) >= MAX_PATH_BYTES or max(map(len, raw.split(b"/"))) > MAX_NAME_BYTES:
        raise UserError("is too long for a path", where=text[:MAX_SHOWN])
    if b"\0" in raw:
        raise UserError("is not a path: it contains NUL", where=ascii(text)[:MAX_SHOWN])
    return path


def local_path(address: str) -> Path:
    """The local path of an address in a recipe: samples are in the cache.

    Raises:
        UserError: as `user_path`.
    """
    if not address.startswith(SAMPLE_PREFIX):
        return user_path(address)
    user_path(address)
    return cache_folder() / "samples" / address.removeprefix(SAMPLE_PREFIX)


def hub_id(address: str) -> str | None:
    """The address of a model, if it can only be an id on the hub: no sample, folder or path."""
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", address, re.ASCII) is not None
    return address if is_id and not local_path(address).is_dir() else None


def hub_cache() -> Path:
    """The cache of the hub's client: `$HF_HUB_CACHE`, else `$HF_HOME/hub`.

    Raises:
        UserError: neither is set, and this user has no home folder.
    """
    try:
        if folder := os.environ.get("HF_HUB_CACHE"):
            return Path(folder).expanduser()
        if home := os.environ.get("HF_HOME"):
            return Path(home).expanduser() / "hub"
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(caches).expanduser() / "huggingface" / "hub"
    except RuntimeError as error:
        message = "this user has no home folder, and no other for the hub's cache is set"
        raise UserError(message, where="HF_HOME", fix="set it to a folder") from error


def hub_snapshot(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub id in the cache of the hub's client, whose import takes a second.

    Args:
        revision: branch, tag or commit; default: main.

    Returns:
        None if nothing of that revision was downloaded.
    """
    repository, commit = hub_cache() / f"models--{name.replace('/', '--')}", revision or "main"
    with suppress(OSError):  # a commit has no file there
        commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
