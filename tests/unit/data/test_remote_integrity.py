"""A fetched file is checked by length and digest, and so is its cached copy."""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from dtrain.config.data import Source
from dtrain.core.errors import UserError
from dtrain.data.records import read_records
from dtrain.data.sources import find_source_files

GOOD = b"".join(json.dumps({"text": f"row {n}"}).encode() + b"\n" for n in range(100))
TEXTS = [f"row {n}" for n in range(100)]


@dataclass
class Site:
    """What the server sends: one body a request, the last of them from then on."""

    address: str = ""
    bodies: list[bytes] = field(default_factory=lambda: [GOOD])
    headers: dict[str, str] = field(default_factory=dict)
    length: int = len(GOOD)
    sent: int = 0

    def body(self) -> bytes:
        self.sent += 1
        return self.bodies[min(self.sent, len(self.bodies)) - 1]


@pytest.fixture
def site() -> Iterator[Site]:
    fake = Site()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(fake.length))
            for name, value in fake.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:  # without a length, as behind a proxy that drops it
            self.send_response(200)
            self.end_headers()
            self.wfile.write(fake.body())

    fsspec.filesystem("http").clear_instance_cache()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    fake.address = f"http://127.0.0.1:{server.server_port}/a.jsonl"
    yield fake
    server.shutdown()
    server.server_close()


def texts(site: Site, cache: Path) -> list[str]:
    source_files = find_source_files(Source(path=site.address), cache)
    return [str(record.value) for record in read_records(source_files, "text")]


def base64(algorithm: str, content: bytes = GOOD) -> str:
    return b64encode(hashlib.new(algorithm, content).digest()).decode()


HEADERS = {
    "Content-MD5": base64("md5"),
    "Digest": f"unixsum=1, SHA-256={base64('sha256')}",
    "Repr-Digest": f"sha-512=:{base64('sha512')}:, sha-256=:{base64('sha256')}:",
    "x-goog-hash": f"crc32c=n03x6A==,md5={base64('md5')}",
    "x-amz-checksum-sha1": base64("sha1"),
}


def test_truncated_download_is_refused_and_removed(site, tmp_path) -> None:
    site.bodies = [GOOD[: GOOD.rindex(b"\n", 0, -1) + 1]]  # at the end of a row
    with pytest.raises(UserError, match=f"of {len(GOOD):,} bytes") as error:
        texts(site, tmp_path)
    assert error.value.where == site.address
    assert not list(tmp_path.rglob("*a.jsonl*"))


@pytest.mark.parametrize("header", HEADERS)
def test_download_with_a_wrong_digest_is_refused(site, tmp_path, header) -> None:
    site.headers = {header: HEADERS[header]}
    site.bodies = [GOOD.replace(b"row 7", b"row 8")]
    with pytest.raises(UserError, match="is not that of the server"):
        texts(site, tmp_path)
    assert not list(tmp_path.rglob("*a.jsonl*"))
    site.bodies = [GOOD]
    assert texts(site, tmp_path) == TEXTS


@pytest.mark.parametrize("first", [GOOD[:-5], GOOD.replace(b"row 7", b"row 8")])
def test_corrupt_download_is_retried_once(site, tmp_path, first) -> None:
    site.headers = {"ETag": f'"{hashlib.md5(GOOD).hexdigest()}"'}
    site.bodies = [first, GOOD]
    assert texts(site, tmp_path) == TEXTS
    assert site.sent == 2


def test_etag_that_is_not_an_md5_is_not_verified(site, tmp_path) -> None:
    """FastAPI's ETag is made of time and size; S3's of an encrypted object is not an MD5."""
    site.headers = {"ETag": f'"{hashlib.md5(b"time and size").hexdigest()}"'}
    assert texts(site, tmp_path) == TEXTS
    site.headers = {"ETag": f'"{hashlib.md5(b"another").hexdigest()}"'}
    site.bodies = [GOOD.replace(b"7", b"%d" % n) for n in range(9)]
    with pytest.raises(UserError, match="its MD5 is not the ETag"):
        texts(site, tmp_path)


DAMAGE = {"bit": GOOD.replace(b"7", b"8"), "cut": GOOD[:-9], "emptied": b""}


@pytest.mark.parametrize("how", ["bit", "cut", "emptied", "removed", "no record"])
def test_corrupt_cached_copy_is_fetched_again(site, tmp_path, how) -> None:
    site.headers = {"ETag": '"1"'}
    assert texts(site, tmp_path) == texts(site, tmp_path) == TEXTS
    assert site.sent == 1
    (copy,) = tmp_path.rglob("a.jsonl")
    if how == "removed":
        copy.unlink()
    elif how == "no record":
        (copy.parent / ".a.jsonl.fetched").unlink()
    else:
        status = copy.stat()
        copy.write_bytes(DAMAGE[how])
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert texts(site, tmp_path) == TEXTS
    assert site.sent == 2


@pytest.mark.parametrize("how", ["bit", "cut", "emptied", "removed"])
def test_corrupt_cached_copy_is_not_used_offline(site, tmp_path, how) -> None:
    site.headers = {"ETag": '"1"'}
    assert texts(site, tmp_path) == TEXTS
    (copy,) = tmp_path.rglob("a.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiohttp.connector.aiohappyeyeballs.start_connection", _refuse)
        fsspec.filesystem("http").clear_instance_cache()
        assert texts(site, tmp_path) == TEXTS
        copy.unlink() if how == "removed" else copy.write_bytes(DAMAGE[how])
        with pytest.raises(UserError, match="the earlier download is damaged"):
            texts(site, tmp_path)


def _refuse(*_: object, **__: object) -> None:
    raise ConnectionRefusedError("nobody is there")


def test_unchanged_download_does_not_replace_the_cached_file(site, tmp_path) -> None:
    """Without an ETag every start fetches the file, while another process may read the copy."""
    source_files = find_source_files(Source(path=site.address), tmp_path)
    find_source_files(Source(path=site.address), tmp_path)
    assert site.sent == 2
    source_files[0].check_unchanged(again=True)
