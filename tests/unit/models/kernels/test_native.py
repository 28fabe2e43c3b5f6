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
    native.switch(on=False)


def test_they_are_built_once_for_their_user(cache: Path) -> None:
    assert native.switch(on=True) == ""
    (built,) = cache.glob("loops-*/*.so")
    assert built.parent.stat().st_mode & 0o077 == 0
    before = built.stat().st_mtime_ns
    assert native.switch(on=True) == "" and built.stat().st_mtime_ns == before


@pytest.mark.parametrize("which", ["folder", "library"])
def test_what_anyone_may_write_to_is_not_loaded(cache: Path, which: str) -> None:
    native.switch(on=True)
    (built,) = cache.glob("loops-*/*.so")
    place = built if which == "library" else built.parent
    place.chmod(place.stat().st_mode | 0o002)
    assert "anyone may write to it" in native.switch(on=True)


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.switch(on=True) == "no C++ compiler"
