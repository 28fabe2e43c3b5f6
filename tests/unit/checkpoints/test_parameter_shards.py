"""Parameters saved in any ranges restore bit for bit into any other ranges."""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dtrain.checkpoints import Checkpoint, ParameterShard, Saver, shard_file
from dtrain.checkpoints.parameter_shards import elements, split_among_replicas
from dtrain.core.errors import UserError


@st.composite
def _model_and_cuts(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], Any, Any, int, int]:
    shape = st.lists(st.integers(1, 7), max_size=3).map(tuple)
    shapes = draw(st.dictionaries(st.text("ab.|é", min_size=1), shape, min_size=1, max_size=4))
    before, after = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def cuts(ranks: int) -> dict[str, list[int]]:
        return {
            name: [0, *sorted(draw(_positions(elements(s), ranks - 1))), elements(s)]
            for name, s in shapes.items()
        }

    return shapes, cuts(before), cuts(after), before, after


def _positions(total: int, count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, total), min_size=count, max_size=count)


@settings(max_examples=60, deadline=None)
@given(_model_and_cuts())
def test_any_split_restores_into_any_other_split(kit: Any, case: Any) -> None:
    shapes, saved_at, read_at, before, after = case
    whole = kit.whole(7, shapes)
    with tempfile.TemporaryDirectory() as folder:
        savers = [Saver(Path(folder), rank=r, ranks=before, attempt="t") for r in range(before)]
        for rank, saver in enumerate(savers):
            saver.save(7, kit.rank_shards(whole, rank, before, shapes, saved_at), {})
        for saver in savers:
            saver.wait()
        checkpoint = Checkpoint.open(Path(folder) / "step-000007")
        blank = {n: {k: torch.zeros_like(t) for k, t in ks.items()} for n, ks in whole.items()}
        for rank in range(after):
            checkpoint.restore(kit.rank_shards(blank, rank, after, shapes, read_at))
    for name, kinds in whole.items():
        assert all(torch.equal(blank[name][kind], kinds[kind]) for kind in kinds)


def test_processes_save_one_checkpoint_together(kit: Any, start: Any, tmp_path: Path) -> None:
    def save(rank: int) -> None:
        saver = Saver(tmp_path, rank=rank, ranks=4, attempt="a1")
        for step in (1, 2, 3):
            saver.save(step, kit.rank_shards(kit.whole(step), rank, 4), {"rank": rank})
        saver.wait()

    processes = [start(save, rank) for rank in range(4)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    for step in (1, 2, 3):
        checkpoint = Checkpoint.open(tmp_path / f"step-{step:06d}")
        checkpoint.verify()
        kit.assert_holds(checkpoint, kit.whole(step))
        assert checkpoint.state == {"rank": 0}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000{s}" for s in (1, 2, 3)]


def test_read_range_spans_several_files(kit: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(kit.save(tmp_path, 3, ranks=4))
    expected = kit.whole(3)["layers.0.b"]["exp_avg"]
    assert torch.equal(checkpoint.read("layers.0.b", "exp_avg", 20, 150), expected[20:150])
    assert checkpoint.read("layers.0.b", "exp_avg", 9, 9).numel() == 0
    with pytest.raises(UserError, match=r"has no layers\.0\.c weight"):
        checkpoint.read("layers.0.c", "weight", 0, 1)
    with pytest.raises(UserError, match="no elements up to 193"):
        checkpoint.read("layers.0.b", "weight", 0, 193)


def test_removed_checkpoint_frees_disk_space_after_a_read(kit: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(kit.save(tmp_path, 3))
    for read in (
        lambda: kit.assert_holds(checkpoint, kit.whole(3)),
        lambda: checkpoint.read("layers.0.b", "weight", 0, 9),
    ):
        read()
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_large_ranges_are_read_in_bounded_chunks(
    kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "READ_ELEMENTS", 7)
    kit.assert_holds(Checkpoint.open(kit.save(tmp_path, 3)), kit.whole(3))


def test_save_stores_the_values_at_the_call(kit: Any, tmp_path: Path) -> None:
    whole, state = kit.whole(1), {"counters": [1]}
    saver = Saver(tmp_path, rank=0, ranks=1, attempt="a")
    saver.save(1, kit.rank_shards(whole, 0, 1), state)
    for kinds in whole.values():
        for tensor in kinds.values():
            tensor.zero_()
    state["counters"].append(2)
    saver.wait()
    checkpoint = Checkpoint.open(tmp_path / "step-000001")
    kit.assert_holds(checkpoint, kit.whole(1))
    assert checkpoint.state == {"counters": [1]}


def test_parameter_shards_may_be_gathered_one_by_one(kit: Any, tmp_path: Path) -> None:
    def gathered() -> Iterator[ParameterShard]:
        room = torch.empty(200)  # one buffer for all, as a gather would have
        for shard in kit.rank_shards(kit.whole(5), 0, 1):
            for kind, tensor in shard.tensors.items():
                room[: tensor.numel()] = tensor
                if kind == "weight":
                    yield ParameterShard(
                        shard.name, shard.shape, 0, shard.stop, {kind: room[: tensor.numel()]}
                    )

    saver = Saver(tmp_path, rank=0, ranks=1, attempt="a")
    saver.save(5, gathered(), {})
    saver.wait()
    weights = {name: {"weight": kinds["weight"]} for name, kinds in kit.whole(5).items()}
    kit.assert_holds(Checkpoint.open(tmp_path / "step-000005"), weights)


def test_files_are_safetensors_that_only_the_owner_can_read(kit: Any, tmp_path: Path) -> None:
    folder = kit.save(tmp_path / "checkpoints", 3)
    tensors = load_file(folder / "rank-00001.safetensors")
    assert torch.equal(tensors["layers.0.a|weight|20"], kit.whole(3)["layers.0.a"]["weight"][20:])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    names = {"manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert Checkpoint.open(folder).size_bytes == total
    assert json.loads((folder / "manifest.json").read_text())["step"] == 3


def test_rank_without_parameters_writes_no_file(kit: Any, tmp_path: Path) -> None:
    savers = [Saver(tmp_path, rank=r, ranks=2, attempt="a") for r in range(2)]
    savers[0].save(1, kit.rank_shards(kit.whole(1), 0, 1), {})
    savers[1].save(1, [], {})
    for saver in savers:
        saver.wait()
    kit.assert_holds(Checkpoint.open(tmp_path / "step-000001"), kit.whole(1))
    assert not (tmp_path / "step-000001/rank-00001.safetensors").exists()


def test_every_mismatch_is_reported_at_once(kit: Any, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(kit.save(tmp_path, 3))
    whole = kit.whole(3)
    shapes = {**kit.shapes, "layers.0.a": (8, 5), "new": (2,)}
    del whole["layers.0.b"]
    whole["new"] = {"weight": torch.zeros(2)}
    del whole["layers.1.gate"]["exp_avg"]
    blank = {n: {k: torch.zeros_like(t) for k, t in ks.items()} for n, ks in whole.items()}
    with pytest.raises(UserError) as refused:
        checkpoint.restore(kit.rank_shards(blank, 0, 1, shapes))
    for said in (
        "1 missing in the checkpoint: new",
        "1 not in the model: layers.0.b",
        "layers.0.a [5, 8] (model [8, 5])",
        "layers.1.gate ['exp_avg', 'exp_avg_sq', 'weight'] (optimizer ['exp_avg_sq', 'weight'])",
    ):
        assert said in str(refused.value)
    assert all(not t.any() for kinds in blank.values() for t in kinds.values())


def _quantized(start: int, stop: int, fill: int) -> ParameterShard:
    tensors = {
        "weight": torch.full((stop - start,), float(fill)),
        "bnb_state1": torch.full((stop - start,), fill, dtype=torch.uint8),
        "bnb_absmax1": torch.full((1,), fill, dtype=torch.bfloat16),
    }
    return ParameterShard("w", (10,), start, stop, tensors)


def test_opaque_state_restores_only_into_the_same_range(tmp_path: Path) -> None:
    savers = [Saver(tmp_path, rank=r, ranks=2, attempt="a") for r in range(2)]
    savers[0].save(1, [_quantized(0, 7, 1)], {})
    savers[1].save(1, [_quantized(7, 10, 2)], {})
    for saver in savers:
        saver.wait()
    checkpoint = Checkpoint.open(tmp_path / "step-000001")
    same, different = _quantized(7, 10, 0), _quantized(5, 10, 0)
    checkpoint.restore([same])
    assert same.tensors["bnb_state1"].tolist() == [2, 2, 2]
    assert same.tensors["bnb_absmax1"].item() == 2
    with pytest.raises(UserError, match=r"cannot be resharded[\s\S]*same engine"):
        checkpoint.restore([different])
    same.tensors["bnb_state1"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(UserError, match=r"this optimizer has torch\.int8"):
        checkpoint.restore([same])


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(3)},
        {"weight": torch.zeros(2, dtype=torch.bfloat16)},
        {"exp_avg": torch.zeros(1, 2)},
    ],
)
def test_inconsistent_parameter_shard_is_refused(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="layer"):
        ParameterShard("layer", (4,), 1, 3, tensors)


def test_replicas_share_a_save_without_gaps(kit: Any, tmp_path: Path) -> None:
    copies = 3
    whole = kit.whole(1)
    savers = [Saver(tmp_path, rank=r, ranks=copies, attempt="a") for r in range(copies)]
    for rank, saver in enumerate(savers):
        saver.save(1, split_among_replicas(kit.rank_shards(whole, 0, 1), rank, copies), {})
    for saver in reversed(savers):
        saver.wait()
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*/*.safetensors"))]
    assert len(sizes) == copies
    kit.assert_holds(Checkpoint.open(tmp_path / "step-000001"), whole)
