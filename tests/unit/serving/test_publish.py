"""`dtrain push`: what is uploaded to a hub, what never is, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dtrain.cli import publish as cli
from dtrain.core.errors import UserError
from dtrain.serving import publish
from dtrain.serving.publish import check_repo, find_result, uploads

URL = "https://huggingface.co/alice/tiny"
TOKEN = "hf_canary9f27c1"
MODE = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub that an upload of small files asks; owner `stranger` is refused."""

    commits: list[dict[str, bytes]]
    tokens: set[str | None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        if "stranger" in self.path:
            self.answer({"error": "no"}, 403)
        elif self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.commits.append({f["path"]: base64.b64decode(f["content"]) for f in files})
            self.answer(
                {"commitUrl": "https://huggingface.co/alice/tiny/commit/0", "commitOid": "0" * 40}
            )
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [MODE | {"path": name} for name in names]})
        else:
            self.answer({"url": URL, "id": "alice/tiny"})

    def do_GET(self) -> None:
        self.answer({"id": "alice/tiny", "private": False})

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a hub, which the client asks from now on."""
    Hub.commits, Hub.tokens = [], set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield address
    server.shutdown()
    server.server_close()


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to damage it."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def test_push_uploads_the_verified_model_with_its_card(
    hub: str, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cli.push(run, "alice/tiny", stage="domain")
    (files,) = Hub.commits
    merged = run / "domain" / "merged"
    assert files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert set(files) == {path.name for path in merged.iterdir()}
    card = files["README.md"].decode()
    assert "vllm serve alice/tiny" in card and "THIS_MODEL" not in card
    assert Hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capfd.readouterr())


def test_dry_run_needs_no_network_and_damage_is_refused_before_it_is_used(
    hub: str, copy: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.push(copy, "alice/tiny", dry_run=True)
    assert "model.safetensors" in (said := capfd.readouterr().out) and "nothing was" in said
    weights = copy / "task" / "merged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="was changed after it was written"):
        cli.push(copy, "alice/tiny")
    monkeypatch.setattr(publish, "get_token", lambda: None)
    with pytest.raises(UserError, match="there is no token"):
        cli.push(copy, "alice/tiny")
    assert not Hub.tokens


def test_refusals_of_the_hub_are_errors(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="may not write there"):
        publish.push({"README.md": b"x"}, "stranger/tiny", private=False)
    with pytest.raises(UserError, match="is public"):
        publish.push({"README.md": b"x"}, "alice/tiny", private=True)
    assert not Hub.commits
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="failed: ConnectError") as caught:
        publish.push({"README.md": b"x"}, "alice/tiny", private=True)
    assert TOKEN not in str(caught.value)


def test_records_for_the_hub_name_no_folder_of_this_machine(copy: Path) -> None:
    adapter = uploads(find_result(copy, "domain", adapter=True), "a/b")
    assert json.loads(bytes(adapter["adapter_config.json"]))["base_model_name_or_path"] is None  # type: ignore[arg-type]
    manifest = copy / "task" / "merged" / "merge.json"
    content = json.loads(manifest.read_text())
    content["source"] = "/home/alice/base"
    content["files"]["../../../../etc/passwd"] = content["files"]["/etc/passwd"] = "0" * 64
    manifest.write_text(json.dumps(content))
    files = uploads(find_result(copy), "a/b")
    assert b"alice" not in bytes(files["merge.json"])  # type: ignore[arg-type]
    assert not [name for name in files if "passwd" in name]


def test_what_is_not_complete_is_refused(copy: Path) -> None:
    with pytest.raises(UserError, match="no stage 'x'"):
        find_result(copy, "x")
    (copy / "task" / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="not what was written"):
        find_result(copy, adapter=True)
    (copy / "task" / "merged" / "merge.json").unlink()
    with pytest.raises(UserError, match="no merged model"):
        find_result(copy)
    (copy / "domain" / "stage.json").unlink()
    with pytest.raises(UserError, match="is not complete"):
        find_result(copy, "domain")


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "a/..", "a b/c", "https://hub/a/b"])
def test_repositories_are_owner_and_name(repo: str) -> None:
    with pytest.raises(UserError, match=r"owner|repo|Repo"):
        check_repo(repo)
