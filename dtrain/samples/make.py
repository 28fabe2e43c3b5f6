"""Builds a sample on first use, once for all processes."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path

from dtrain.core.cache_paths import SAMPLE_PREFIX, sample_folder
from dtrain.core.errors import UserError, nearest_name
from dtrain.core.files import atomic_folder, write_json
from dtrain.core.locks import FolderLock
from dtrain.core.log import say

# Name → (module with `make(folder)`, version of its output). A new version replaces an old sample.
# The modules are imported on demand, so that the path of an existing sample needs no torch.
SAMPLES: dict[str, tuple[str, int]] = {
    "smollm2-135m": ("smollm2", 1),
    "tiny-llama": ("tiny_llama", 1),
    "tiny-text": ("tiny_text", 1),
    "python-docs": ("python_docs", 4),
    "general": ("general", 1),
}
STAMP = "sample.json"


def ensure(name: str) -> Path:
    """Build the sample `name` unless it exists, and return its folder.

    Any number of processes may call this at once: one builds the sample, the others wait.

    Raises:
        UserError: there is no such sample, or it cannot be built (no registry, no disk space).
    """
    check_known(name)
    folder = sample_folder(name)
    if _is_current(folder, name):
        return folder
    lock = FolderLock(folder.parent)
    try:
        if not lock.acquire():
            say(f"waiting for {lock.holder()}, which builds samples in {folder.parent}")
            lock.acquire(wait=True)
        if not _is_current(folder, name):
            _make(folder, name)
    except OSError as error:
        raise UserError(
            f"cannot build sample {name}: {error}",
            where=str(folder.parent),
            fix="set DTRAIN_CACHE to a writable folder with free space",
        ) from error
    finally:
        lock.release()
    return folder


def _make(folder: Path, name: str) -> None:
    module, version = SAMPLES[name]
    say(f"building sample {name} in {folder}")
    if folder.exists():
        _discard(folder)
    with atomic_folder(folder) as temporary:
        import_module(f"dtrain.samples.{module}").make(temporary)
        write_json(temporary / STAMP, {"name": name, "version": version})


def _discard(folder: Path) -> None:
    """Remove `folder` without exposing a partly removed state."""
    aside = tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent)
    folder.rename(Path(aside) / folder.name)
    shutil.rmtree(aside, ignore_errors=True)


def _is_current(folder: Path, name: str) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == {"name": name, "version": SAMPLES[name][1]})


def check_known(name: str) -> None:
    """Check that there is a sample of this name.

    Raises:
        UserError: there is none.
    """
    if name in SAMPLES:
        return
    fix = nearest_name(name, SAMPLES, f"choose from: {', '.join(SAMPLES)}")
    raise UserError(f"there is no sample {name!r}", where=f"{SAMPLE_PREFIX}{name}", fix=fix)
