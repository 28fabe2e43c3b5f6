"""Compiled loops: built for this user alone, and never loaded from where others can write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.models.kernels import native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    yield tmp_path
    native.set_enabled(on=False)


def test_library_is_built_once_per_user(cache: Path) -> None:
    assert native.set_enabled(on=True) == ""
    (built,) = cache.glob("loops-*/*.so")
    assert built.parent.stat().st_mode & 0o077 == 0
    before = built.stat().st_mtime_ns
    assert native.set_enabled(on=True) == "" and built.stat().st_mtime_ns == before


@pytest.mark.parametrize("which", ["folder", "library"])
def test_library_writable_by_others_is_not_loaded(cache: Path, which: str) -> None:
    native.set_enabled(on=True)
    (built,) = cache.glob("loops-*/*.so")
    folder = built if which == "library" else built.parent
    folder.chmod(folder.stat().st_mode | 0o002)
    assert "anyone may write to it" in native.set_enabled(on=True)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_library_is_built_again(cache: Path, damage: str) -> None:
    """In place of SIGBUS or SIGSEGV at every start."""
    native.set_enabled(on=True)
    (built,) = cache.glob("loops-*/*.so")
    content = built.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes(b ^ 0xFF for b in content[middle : middle + 4096])
    damaged = {"cut": content[:middle], "flipped": flipped + content[middle + 4096 :], "empty": b""}
    built.unlink()  # this process has mapped it
    built.write_bytes(damaged[damage])
    assert native.set_enabled(on=True) == ""
    assert content in [path.read_bytes() for path in cache.glob("loops-*/*.so")]


def test_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.set_enabled(on=True) == "no C++ compiler"
