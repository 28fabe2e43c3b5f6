"""Rows are read from a local web server."""

from __future__ import annotations

import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from dtrain.config.data import Source
from dtrain.core.errors import UserError
from dtrain.data.records import read_records
from dtrain.data.sources import find_source_files


class Quiet(SimpleHTTPRequestHandler):
    """Serves files, and says nothing; /to/ADDRESS redirects to the address."""

    def do_GET(self) -> None:
        self._redirect() or super().do_GET()

    def do_HEAD(self) -> None:
        self._redirect() or super().do_HEAD()

    def _redirect(self) -> bool:
        if not self.path.startswith("/to/"):
            return False
        self.send_response(302)
        self.send_header("Location", self.path.removeprefix("/to/"))
        self.end_headers()
        return True

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a server shows it."""
    folder = tmp_path / "site"
    folder.mkdir()
    fsspec.filesystem("http").clear_instance_cache()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def texts(address: str, cache: Path) -> list[tuple[str, str]]:
    source_files = find_source_files(Source(path=address), cache)
    return [
        (source_files[r.file_index].location(r.row_number), r.value)
        for r in read_records(source_files, "auto")
    ]


def test_http_rows_are_read_and_named_by_their_url(site, tmp_path) -> None:
    folder, address = site
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    expected = [(f"{address}/a.jsonl:1", "one"), (f"{address}/a.jsonl:2", "two")]
    assert texts(f"{address}/a.jsonl", tmp_path) == expected
    (folder / "a.jsonl").write_text('{"text": "another"}\n')
    assert texts(f"{address}/a.jsonl", tmp_path) == [(f"{address}/a.jsonl:1", "another")]


def test_missing_file_on_the_server_is_reported(site, tmp_path) -> None:
    _, address = site
    with pytest.raises(UserError, match="404") as error:
        texts(f"{address}/none.jsonl", tmp_path)
    assert error.value.where == f"{address}/none.jsonl" and "none.jsonl" in error.value.message
    assert not list((tmp_path / "remote").rglob("none*"))


def test_unreachable_server_is_reported(site, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # nobody listens, and nobody else can
        unused_address = f"http://127.0.0.1:{probe.getsockname()[1]}/a.jsonl"
        with pytest.raises(UserError, match="Cannot connect to host") as error:
            texts(unused_address, tmp_path)
    assert error.value.where == unused_address


def test_cached_file_is_used_offline_until_it_is_removed(site, tmp_path, capsys) -> None:
    folder, address = site
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    before = texts(f"{address}/a.jsonl", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _refuse)
        patch.setattr("aiohttp.connector.aiohappyeyeballs.start_connection", _refuse)
        fsspec.filesystem("http").clear_instance_cache()
        assert texts(f"{address}/a.jsonl", tmp_path) == before
    assert "using the earlier download" in capsys.readouterr().out
    (folder / "a.jsonl").unlink()
    with pytest.raises(UserError, match="404"):
        texts(f"{address}/a.jsonl", tmp_path)


@pytest.mark.parametrize("form", ["{}", "simplecache::{}", "zip://a.jsonl::{}"])
def test_redirect_to_another_server_is_refused(site, tmp_path, form) -> None:
    folder, address = site
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "a.jsonl", "a.jsonl")
    name = "a.zip" if "zip" in form else "a.jsonl"
    other = address.replace("127.0.0.1", "localhost")
    with pytest.raises(UserError, match=f"redirects to another one: {other}") as error:
        texts(form.format(f"{address}/to/{other}/{name}"), tmp_path)
    assert "DTRAIN_REDIRECT_HOSTS=localhost" in error.value.fix
    assert not list((tmp_path / "remote").rglob("a.*"))
    for target in (f"{address}/{name}", f"/{name}") if "zip" not in form else ():  # the same server
        assert texts(form.format(f"{address}/to/{target}"), tmp_path)[0][1] == "one"


def test_redirect_is_refused_with_an_earlier_copy_and_allowed_by_name(
    site, tmp_path, monkeypatch
) -> None:
    folder, address = site
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    source = f"{address}/to/{address.replace('127.0.0.1', 'localhost')}/a.jsonl"
    monkeypatch.setenv("DTRAIN_REDIRECT_HOSTS", "cdn.example.com localhost")
    assert [text for _, text in texts(source, tmp_path)] == ["one"]
    monkeypatch.delenv("DTRAIN_REDIRECT_HOSTS")
    with pytest.raises(UserError, match="redirects to another one"):
        texts(source, tmp_path)


def test_redirect_to_another_port_is_refused(site, tmp_path) -> None:
    _, address = site
    with pytest.raises(UserError, match="redirects to another one"):
        texts(f"{address}/to/http://127.0.0.1:9/a.jsonl", tmp_path)


def _refuse(*_: object, **__: object) -> None:
    raise ConnectionRefusedError("nobody is there")


def test_missing_package_is_named(tmp_path) -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from pathlib import Path; "
    code += "from dtrain.data.remote import fetch; fetch('http://127.0.0.1:9/a', Path('.'), str)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert "UserError: http://127.0.0.1:9/a: cannot be read" in done.stderr
    assert '"aiohttp" to be installed' in done.stderr
