"""`dtrain model fetch` against a hub of this machine: whole, resumed, refused, and then offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dtrain.core.cache_paths import hub_snapshot
from dtrain.core.weight_files import undownloaded

HEADER = json.dumps({"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model-1.safetensors": WEIGHTS,
    "model-2.safetensors": WEIGHTS,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}
    ).encode(),
    "pytorch_model.bin": b"a pickle",
}
COMMITS = {"main": "1" * 40, "v2": "2" * 40}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}


class Hub(BaseHTTPRequestHandler):
    """The two routes of the hub that a download of a model takes."""

    asked: list[str]
    broken: set[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        kind, _, revision = path.removeprefix("/api/models/me/mine/").partition("/")
        if kind == "revision" and revision in COMMITS:
            siblings = [{"rfilename": name} for name in FILES]
            known = {"sha": COMMITS[revision], "siblings": siblings, "id": "me/mine"}
            self.send(200, json.dumps(known).encode(), body=body)
        elif kind == "tree" and revision in COMMITS.values():
            tree = [file_entry(name, content) for name, content in FILES.items()]
            self.send(200, json.dumps(tree).encode(), body=body)
        elif path.startswith("/me/mine/resolve/"):
            commit, _, name = path.removeprefix("/me/mine/resolve/").partition("/")
            if name in self.broken:
                self.send(500, b"", body=body)
                return
            content = FILES[name]
            headers = {"ETag": f'"{git_hash(content)}"', "X-Repo-Commit": commit}
            self.send(200, content, headers, body=body)
        else:
            code = "RevisionNotFound" if path.startswith("/api/models/me/mine") else "RepoNotFound"
            self.send(404, b"{}", {"X-Error-Code": code}, body=body)

    def send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"asked": [], "broken": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def fetch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dtrain", "model", "fetch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)


def test_a_download_continues_and_later_needs_no_hub(hub: type[Hub], tmp_path: Path) -> None:
    hub.broken.add("model-2.safetensors")
    first = fetch("me/mine")
    assert first.returncode == 2 and "Traceback" not in first.stderr
    assert "`dtrain model fetch me/mine`" in first.stderr
    assert "not downloaded" in undownloaded("me/mine")
    hub.broken.clear()
    hub.asked.clear()
    (tmp_path / "my.yaml").write_text(RECIPE)
    second = fetch(str(tmp_path / "my.yaml"))
    assert second.returncode == 0, second.stderr
    folder = Path(second.stdout.strip())
    assert folder == hub_snapshot("me/mine") and undownloaded("me/mine") == ""
    assert not any(name.endswith("model-1.safetensors") for name in hub.asked)  # it was there
    assert {path.name for path in folder.iterdir()} == FILES.keys() - {"pytorch_model.bin"}
    hub.asked.clear()
    code = "from dtrain.models.hub import base_folder; print(base_folder('me/mine'))"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert again.stdout.strip() == str(folder) and hub.asked == []


def test_a_revision_is_fetched_apart(hub: type[Hub]) -> None:
    done = fetch("me/mine", "--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(COMMITS["v2"])
    assert undownloaded("me/mine", "v2") == undownloaded("me/mine", COMMITS["v2"]) == ""
    assert "was not downloaded" in undownloaded("me/mine")


def test_what_cannot_be_fetched(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "me/mine has no revision 'v3'" in fetch("me/mine", "--revision", "v3").stderr
    absent = fetch("me/other")
    assert absent.returncode == 2 and "no folder and no hub model 'me/other'" in absent.stderr
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    offline = fetch("me/mine")
    assert offline.returncode == 2 and "on a machine that reaches the hub" in offline.stderr


RECIPE = """
name: x
model: {base: me/mine}
stages:
  - {name: a, kind: cpt, method: {kind: lora}, data: {sources: [{path: a.txt}]},
     train: {global_batch_size: 1, steps: 1}}
output: {folder: runs/x}
"""
