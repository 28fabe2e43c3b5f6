"""A cached hash is used only while the file is unchanged."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dtrain.core import hash_cache
from dtrain.core.hash_cache import (
    FileIdentity,
    cached_hash,
    file_state,
    lookup_hash,
    remember_hash,
)
from dtrain.core.hashes import file_hash


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights" * 1000)
    os.utime(path, (1e9, 1e9))
    return path


def test_file_is_hashed_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = file_hash(file)
    assert cached_hash(file) == expected
    monkeypatch.setattr(hash_cache, "file_hash", None)
    assert cached_hash(file) == expected


@pytest.mark.parametrize("how", ["time", "size", "replaced", "overwritten"])
def test_changed_file_is_hashed_again(file: Path, how: str) -> None:
    """The file is replaced and overwritten with equal size and modification time."""
    before, changed = cached_hash(file), file.stat().st_ctime_ns
    if how == "replaced":
        file.rename(file.with_name("old"))
    while not file.exists() or file.stat().st_ctime_ns == changed:  # clocks tick in milliseconds
        file.write_bytes(b"Weights" * (1001 if how == "size" else 1000))
        os.utime(file, (1e9, 1e9 + 1 if how == "time" else 1e9))
    assert cached_hash(file) == file_hash(file) != before


def test_hash_of_a_just_written_file_is_not_cached(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 3600)
    cached_hash(file)
    assert lookup_hash(file) is None
    remember_hash(file, "of what was written here", file_state(file), written_here=True)
    assert lookup_hash(file) == "of what was written here"


def test_file_that_was_young_when_it_was_read_stays_young(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have changed after its state was read, with the same time; hashing takes longer."""
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 3600)
    seconds, of_content = time.time(), hash_cache.file_hash

    def take_hours(path: Path) -> str:
        monkeypatch.setattr(time, "time", lambda: seconds + 7200)
        return of_content(path)

    monkeypatch.setattr(hash_cache, "file_hash", take_hours)
    identity = FileIdentity.of(file)
    assert not identity.state.settled
    monkeypatch.setattr(time, "time", lambda: seconds)
    cached_hash(file)
    assert time.time() > seconds and lookup_hash(file) is None
    assert FileIdentity.of(file).state.settled


def test_hash_of_a_file_changed_during_the_read_is_not_cached(file: Path) -> None:
    state = file_state(file)
    os.utime(file, (2e9, 2e9))
    remember_hash(file, "old", state, written_here=True)
    assert lookup_hash(file) is None


def test_corrupt_cache_entry_is_ignored(file: Path) -> None:
    expected = cached_hash(file)
    hash_cache._entry_path(file).write_text("[")
    assert cached_hash(file) == expected
