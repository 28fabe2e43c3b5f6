"""Rows are read from fsspec addresses; the store is in memory."""

from __future__ import annotations

import json

import fsspec
import pytest

from dtrain.config.data import Source
from dtrain.core.errors import UserError
from dtrain.core.hashes import file_hash
from dtrain.core.locks import FolderLock
from dtrain.data import remote
from dtrain.data.records import read_records
from dtrain.data.sources import find_source_files, readable_files


@pytest.fixture
def bucket():
    """bucket(name, texts) writes JSON lines into a store in memory."""
    store = fsspec.filesystem("memory")

    def write(name: str, texts: list[str]) -> None:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        store.pipe(f"/bucket/{name}", content.encode())

    yield write
    store.rm("/bucket", recursive=True)


def texts(address: str, cache) -> list[tuple[str, str]]:
    source_files = find_source_files(Source(path=address), cache)
    return [
        (source_files[r.file_index].location(r.row_number), r.value)
        for r in read_records(source_files, "auto")
    ]


def test_remote_file_folder_and_glob_are_read(bucket, tmp_path) -> None:
    bucket("a.jsonl", ["one", "two"])
    bucket("deep/b.jsonl", ["three"])
    first = [("memory:///bucket/a.jsonl:1", "one"), ("memory:///bucket/a.jsonl:2", "two")]
    deep = [("memory:///bucket/deep/b.jsonl:1", "three")]
    assert texts("memory://bucket/a.jsonl", tmp_path) == first
    assert texts("memory://bucket", tmp_path) == first + deep
    assert texts("memory://bucket/**/b.jsonl", tmp_path) == deep


def test_remote_folder_is_read_like_a_local_one(bucket, tmp_path) -> None:
    for name in ("a.jsonl", "page.html", "_SUCCESS", ".b.jsonl", ".c/d.jsonl"):
        bucket(name, ["one"])
    assert texts("memory://bucket", tmp_path) == [("memory:///bucket/a.jsonl:1", "one")]
    assert not list(tmp_path.rglob("page.html"))  # nor fetched
    with pytest.raises(UserError, match="unknown file type"):
        texts("memory://bucket/*", tmp_path)


def test_file_fetched_by_another_process_is_not_fetched_again(
    bucket, tmp_path, monkeypatch
) -> None:
    class Waiting(FolderLock):
        def __enter__(self) -> FolderLock:
            super().__enter__()
            copy = self.path.parent / "a.jsonl"
            copy.write_text('{"text": "of the other"}\n')
            record = {"blake3": file_hash(copy), "bytes": copy.stat().st_size}
            copy.with_name(".a.jsonl.fetched").write_text(json.dumps(record))
            return self

    bucket("a.jsonl", ["one"])
    monkeypatch.setattr(remote, "FolderLock", Waiting)
    rows = texts("memory://bucket/a.jsonl", tmp_path)
    assert rows == [("memory:///bucket/a.jsonl:1", "of the other")]


def test_only_a_changed_file_is_fetched_again(bucket, tmp_path, monkeypatch) -> None:
    bucket("a.jsonl", ["one"])
    before = find_source_files(Source(path="memory://bucket/a.jsonl"), tmp_path)[0]
    store = type(fsspec.filesystem("memory"))
    fetched = []
    get = store.get_file
    monkeypatch.setattr(store, "get_file", lambda *a, **k: fetched.append(a) or get(*a, **k))
    assert find_source_files(Source(path="memory://bucket/a.jsonl"), tmp_path)[0] == before
    assert not fetched
    bucket("a.jsonl", ["two"])
    after = find_source_files(Source(path="memory://bucket/a.jsonl"), tmp_path)[0]
    assert len(fetched) == 1 and after.identity != before.identity


def test_unreachable_store_keeps_fetched_files(bucket, tmp_path, monkeypatch, capsys) -> None:
    bucket("a.jsonl", ["fox"])
    before = texts("memory://bucket/a.jsonl", tmp_path)

    def unreachable(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", unreachable)
    assert texts("memory://bucket/a.jsonl", tmp_path) == before
    assert "using the earlier download" in capsys.readouterr().out
    with pytest.raises(UserError, match="no route to host"):
        texts("memory://bucket/b.jsonl", tmp_path)
    for record in (tmp_path / "remote").glob("*.json"):
        record.write_text('[["a"]]')  # damaged
    with pytest.raises(UserError, match=r"json: 0: list should have at least 2"):
        texts("memory://bucket/a.jsonl", tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        "https://me:hunter2@host/a.jsonl",
        "s3://bucket/a.jsonl?signature=hunter2",
        "simplecache::https://me:hunter2@host/a.jsonl",
        "zip://a.jsonl::https://me:hunter2@host/a.zip",
        "zip://a.jsonl::s3://bucket/a.zip?signature=hunter2",
    ],
)
def test_address_with_a_secret_is_refused_without_showing_it(address, tmp_path) -> None:
    with pytest.raises(UserError, match="would be logged") as error:
        remote.fetch(address, tmp_path, readable_files)
    assert "hunter2" not in str(error.value)


def test_missing_file_and_unknown_store_are_reported(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        remote.fetch("memory://nowhere/a.jsonl", tmp_path, readable_files)
    with pytest.raises(UserError, match=r"Protocol not known: nostore") as error:
        remote.fetch("nostore://a/b.jsonl", tmp_path, readable_files)
    assert "s3fs" in error.value.fix
