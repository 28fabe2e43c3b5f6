"""A source that changes during preparation is refused; one changed before is read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dtrain.config.data import Data
from dtrain.core import hash_cache
from dtrain.core.errors import UserError
from dtrain.data import prepare as preparation
from dtrain.data import shards
from dtrain.data.prepare import prepare
from dtrain.data.records import open_source
from dtrain.data.shards import ShardBuilder
from dtrain.data.tokenize import FullTextEncoder
from dtrain.data_quality.clean import clean
from dtrain.data_quality.scan import scan
from dtrain.objectives.causal_lm import ContinuedPretraining

CPT = ContinuedPretraining.dataset

BEFORE, AFTER = [f"text {n:03} a" for n in range(90)], [f"text {n:03} b" for n in range(90)]


def write(path: Path, texts: list[str]) -> None:
    """The rows, in a file of the same size for texts of the same length."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, compression="none")
    elif path.suffix == "":
        Dataset.from_dict({"text": texts}).save_to_disk(str(path))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def overwrite(path: Path) -> None:
    """Other content, in place, with the old size and time."""
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # clocks tick in milliseconds
        content = file.read_bytes()
        with open(file, "r+b") as out:
            out.write(content.replace(b" a", b" b"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_ino) == (before.st_size, before.st_ino)


def replace(path: Path) -> None:
    """Another file of the same size and time under the name."""
    before = path.stat()
    replacement = path.with_name(f"new{path.suffix}")
    write(replacement, AFTER)
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(replacement, path)


def data(path: Path) -> Data:
    return Data.model_validate({"sources": [{"path": str(path), "format": "text"}]})


@pytest.fixture
def prepared(tmp_path, tokenizer):
    return lambda path: prepare(data(path), CPT, tokenizer, "t", tmp_path / "cache", processes=1)


@pytest.mark.parametrize("how", [overwrite, replace])
@pytest.mark.parametrize("large", [False, True])
def test_replaced_file_of_equal_size_and_time_is_new_data(
    prepared, tmp_path, monkeypatch, how, large
) -> None:
    if large:
        monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "hashes"))
        monkeypatch.setattr(hash_cache, "CACHE_FROM_BYTES", 1)
        monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", -1e9)
    path = tmp_path / "a.jsonl"
    write(path, BEFORE)
    before = prepared(path).fingerprint
    assert prepared(path).fingerprint == before
    how(path)
    assert prepared(path).fingerprint != before


def at_first_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, change: Any) -> None:
    """Let the first call of a method be followed by a change of the source."""
    real, left = getattr(owner, name), [change]

    def run(*args: Any, **more: Any) -> Any:
        result = real(*args, **more)
        if left:
            left.pop()()
        return result

    monkeypatch.setattr(owner, name, run)


MOMENTS = {
    "while it is cut": (shards, "_count_characters"),
    "while it is tokenized": (FullTextEncoder, "documents"),
    "after the last shard": (ShardBuilder, "build"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "saved"])
def test_change_during_preparation_is_refused_and_no_store_is_published(
    prepared, tmp_path, monkeypatch, name, moment
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 30)
    path = tmp_path / name
    write(path, BEFORE)
    owner, method = MOMENTS[moment]
    with monkeypatch.context() as patch:
        at_first_call(patch, owner, method, lambda: overwrite(path))
        with pytest.raises(UserError, match="the file changed while it was read") as error:
            prepared(path)
    assert str(path) in error.value.where
    assert not list((tmp_path / "cache").rglob("store.json"))
    if moment != "after the last shard":
        assert not list((tmp_path / "cache").rglob("shard-*"))  # nor kept for another start
    after = prepared(path)
    write(tmp_path / "other.jsonl", AFTER)
    rows = [prepared(tmp_path / "other.jsonl").sequence(0).input_ids.tolist()]
    assert [after.sequence(0).input_ids.tolist()] == rows


def test_change_that_is_undone_after_tokenizing_is_refused(prepared, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    write(path, BEFORE)
    before, content = path.stat(), path.read_bytes()

    def put_back() -> None:
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with monkeypatch.context() as patch:
        at_first_call(patch, shards, "_count_characters", lambda: overwrite(path))
        at_first_call(patch, FullTextEncoder, "documents", put_back)
        with pytest.raises(UserError, match="the file changed while it was read"):
            prepared(path)
    assert not list((tmp_path / "cache").rglob("store.json"))
    assert not list((tmp_path / "cache").rglob("shard-*"))


def test_inserted_line_is_refused(prepared, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    write(path, BEFORE)
    first = json.dumps({"text": "first"}) + "\n"
    change = lambda: path.write_text(first + path.read_text())  # noqa: E731
    at_first_call(monkeypatch, preparation, "find_boundaries", change)
    with pytest.raises(UserError, match="the file changed while it was read"):
        prepared(path)
    assert not list((tmp_path / "cache").rglob("s*-*"))


def test_change_without_a_new_timestamp_is_found_by_hash(prepared, tmp_path, monkeypatch) -> None:
    """A file written a moment ago may change again within one tick of the clock."""
    path = tmp_path / "a.jsonl"
    write(path, BEFORE)
    state = hash_cache.file_state(path)
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 1e9)
    monkeypatch.setattr(hash_cache, "file_state", lambda path: state)
    at_first_call(monkeypatch, ShardBuilder, "build", lambda: write(path, AFTER))
    with pytest.raises(UserError, match="the file changed while it was read"):
        prepared(path)
    assert not list((tmp_path / "cache").rglob("store.json"))


def test_a_removed_file_is_named(prepared, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    write(path, BEFORE)
    at_first_call(monkeypatch, ShardBuilder, "build", path.unlink)
    with pytest.raises(UserError, match=r"a\.jsonl: the file changed while it was read"):
        prepared(path)


def test_source_changed_since_its_scan_is_not_cleaned(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, BEFORE)
    result = scan([open_source(data(path).sources[0])])
    overwrite(path)
    with pytest.raises(UserError, match="the file changed while it was read"):
        clean(result, data(path).clean, tmp_path / "out")
    assert not (tmp_path / "out").exists()
