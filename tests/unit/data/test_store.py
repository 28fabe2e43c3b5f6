"""The store opens quickly and never opens when damaged."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from dtrain.core.errors import UserError
from dtrain.core.files import read_sealed, write_sealed
from dtrain.data import store as module
from dtrain.data.packing import SEGMENT
from dtrain.data.store import Store


@pytest.fixture
def folder(prepared, write_rows):
    path = write_rows("a.jsonl", [{"text": "fox and dog " * 9} for _ in range(50)])
    return prepared("cpt", [{"path": path, "format": "text"}]).sources[0].store.folder


def test_verify_accepts_an_intact_store_and_lists_hashes_like_b3sum(folder) -> None:
    Store(folder).verify()
    listed = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    names = listed - {"store.json", "B3SUMS"}
    lines = [f"{blake3((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    assert sorted((folder / "B3SUMS").read_text().splitlines()) == sorted(lines)


@pytest.mark.parametrize("name", ["sequences.npy", "segments.npy", "B3SUMS"])
def test_truncated_plan_does_not_open(folder, name) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{name}: the prepared data is damaged: .* bytes") as e:
        Store(folder)
    assert f"delete the folder {folder}" in e.value.fix


def test_a_missing_or_truncated_shard_is_not_read(folder) -> None:
    shard = folder / "shard-00000.arrow"
    data = shard.read_bytes()
    shard.write_bytes(data[:100])
    with pytest.raises(UserError, match=r"shard-00000\.arrow: .* 100 bytes instead of"):
        Store(folder).sequence(0)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.arrow: .* it is missing"):
        Store(folder).sequence(0)


@pytest.mark.parametrize("name", ["sequences.npy", "shard-00000.arrow", "B3SUMS"])
def test_one_flipped_bit_is_found_by_verify(folder, name) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="its content is not what was written"):
        Store(folder).verify()


def test_a_broken_manifest_is_reported(folder) -> None:
    (folder / "store.json").write_text("{")
    with pytest.raises(UserError, match=r"store\.json: .*cannot be read"):
        Store(folder)


@pytest.mark.parametrize("key", ["longest_segment", "largest_token", "counts", "files"])
def test_a_manifest_of_another_version_does_not_open(folder, key) -> None:
    manifest = read_sealed(folder / "store.json")
    del manifest[key]
    write_sealed(folder / "store.json", manifest)
    with pytest.raises(UserError, match=rf"it has no {key}, as another version") as e:
        Store(folder)
    assert f"delete the folder {folder}" in e.value.fix


def test_opening_maps_the_plan_and_reads_no_shard(folder, monkeypatch) -> None:
    monkeypatch.setattr(module, "map_shard", pytest.fail)
    store = Store(folder)
    for array in (store.segments, store.sequence_offsets, store.sequence_tokens, store.shards):
        assert isinstance(array.base, np.memmap)


def test_a_store_of_1e9_rows_opens_without_reading_them(folder) -> None:
    """The plan of a huge store, as sparse files: opening may not touch what it does not need."""
    manifest = read_sealed(folder / "store.json")
    rows = 10**9
    kinds = {"segments.npy": SEGMENT, "sequences.npy": "<i8", "sequence_tokens.npy": "<i4"}
    for name, kind in {
        **kinds,
        "sequence_targets.npy": "<i4",
        "sequence_examples.npy": "<i4",
    }.items():
        array = np.lib.format.open_memmap(
            folder / name, mode="w+", dtype=kind, shape=(rows + (name == "sequences.npy"),)
        )
        if name == "sequences.npy":
            array[rows - 1 :] = [rows - 1, rows]
        elif name == "segments.npy":
            array[rows - 1] = (3, 0, 20)
        else:
            array[rows - 1] = 20
        del array
        manifest["files"][name]["bytes"] = (folder / name).stat().st_size
    write_sealed(folder / "store.json", {**manifest, "sequences": rows})
    before = resident_bytes()
    store = Store(folder)
    assert store.sequence(rows - 1).row_numbers == [4]
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
