"""Checkpoints that another user could have written are not read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from dtrain.checkpoints import Checkpoint, Untrusted, newest_complete
from dtrain.core.errors import UserError


def _sealed(body: dict[str, Any]) -> str:
    text = json.dumps(body)
    return f'{text[:-1]},"blake3":"{blake3(text.encode()).hexdigest()}"}}\n'


def _rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and hash it again, as an attacker could."""
    body = json.loads((folder / "manifest.json").read_text())
    del body["blake3"]
    change(body)
    (folder / "manifest.json").write_text(_sealed(body))


def _pickle(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(pickle.dumps({"step": 1}))


def _link(folder: Path) -> None:
    elsewhere = (folder / "rank-00000.safetensors").rename(folder.parent / "elsewhere")
    (folder / "rank-00000.safetensors").symlink_to(elsewhere)


def _linked_folder(folder: Path) -> None:
    folder.symlink_to(folder.rename(folder.parent / "elsewhere"))


def _newer(body: dict[str, Any]) -> None:
    body["format"] = 4


def _older(folder: Path, version: int) -> None:
    """Formats 1 and 2 carried a SHA-256."""
    body = json.loads((folder / "manifest.json").read_text()) | {"format": version}
    del body["blake3"]
    text = json.dumps(body)
    seal = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": seal}) + "\n")


def _outside(body: dict[str, Any]) -> None:
    body["files"]["../rank-00000.safetensors"] = body["files"].pop("rank-00000.safetensors")


def _hole(body: dict[str, Any]) -> None:
    body["parameters"]["layers.0.a"]["kinds"]["weight"]["slices"].pop()


def _nonsense(body: dict[str, Any]) -> None:
    body["parameters"] = 3


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (lambda folder: folder.chmod(0o777), "anyone may write"),
        (lambda folder: (folder / "manifest.json").chmod(0o666), "anyone may write"),
        (lambda folder: (folder / "rank-00001.safetensors").chmod(0o602), "anyone may write"),
        (_pickle, "optimizer.pt: this file is not listed"),
        (_link, "is a symlink"),
        (_linked_folder, "is a symlink"),
        (lambda folder: _rewritten(folder, _newer), "format 4, this dtrain reads 3"),
        (lambda folder: _older(folder, 1), r"format 1, this dtrain reads 3\n.*an older dtrain"),
        (lambda folder: _older(folder, 2), r"format 2, this dtrain reads 3\n.*an older dtrain"),
        (lambda folder: _rewritten(folder, _outside), "not a manifest of dtrain"),
        (lambda folder: _rewritten(folder, _hole), "are missing"),
        (lambda folder: _rewritten(folder, _nonsense), "not a manifest of dtrain"),
    ],
)
def test_untrusted_checkpoint_is_refused_and_not_skipped(
    kit: Any, tmp_path: Path, attack: Callable[[Path], Any], said: str
) -> None:
    kit.save(tmp_path, 1)
    folder = kit.save(tmp_path, 2)
    attack(folder)
    for read in (lambda: Checkpoint.open(folder), lambda: newest_complete(tmp_path)):
        with pytest.raises(Untrusted, match=said):
            read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", [".", "manifest.json", "rank-00000.safetensors"])
def test_checkpoint_of_another_owner_is_refused(kit: Any, tmp_path: Path, name: str) -> None:
    folder = kit.save(tmp_path, 1)
    os.chown(folder / name, 12345, -1)
    with pytest.raises(Untrusted, match="belongs to user 12345"):
        Checkpoint.open(folder)


def test_renamed_checkpoint_is_not_accepted_as_newer(kit: Any, tmp_path: Path) -> None:
    kit.save(tmp_path, 1).rename(tmp_path / "step-000009")
    newest, reasons = newest_complete(tmp_path)
    assert newest is None and "contains step 1" in reasons[0]


def test_slices_that_point_to_another_tensor_are_refused(kit: Any, tmp_path: Path) -> None:
    folder = kit.save(tmp_path, 1, ranks=1)

    def swell(body: dict[str, Any]) -> None:
        gate = body["parameters"]["layers.1.gate"]
        gate["shape"] = [9]
        for kind in gate["kinds"].values():
            kind["slices"] = [[0, 9, "rank-00000.safetensors"]]

    _rewritten(folder, swell)
    with pytest.raises(UserError, match=r"layers\.1\.gate\|weight\|0 cannot be read: .*9 needed"):
        Checkpoint.open(folder).read("layers.1.gate", "weight", 0, 9)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"blake3": 1}', "[" * 100_000])
def test_invalid_manifest_is_not_a_checkpoint(kit: Any, tmp_path: Path, text: str) -> None:
    folder = kit.save(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest"):
        Checkpoint.open(folder)
