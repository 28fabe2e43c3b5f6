"""Verify reports every problem, and diff measures differences as torch does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import write_json
from dtrain.core.hashes import file_hash
from dtrain.merge.diff import diff_models
from dtrain.merge.merge import FORMAT
from dtrain.merge.verify import verify_model
from dtrain.models.stored_tensors import row_blocks
from tests.unit.models.mixtures import plain, write_mixture

SHAPES = {"a.weight": (130, 70), "b.weight": (64, 3), "c.bias": (5,)}


def model(folder: Path, dtype: torch.dtype = torch.float32, **changed: Tensor) -> Path:
    """One file a tensor, with an index and a manifest."""
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {n: torch.randn(shape).to(dtype) for n, shape in SHAPES.items()}
    weight_map = {}
    for name, tensor in (tensors | {"ids": torch.arange(6)} | changed).items():
        weight_map[name] = f"model-{name[0]}.safetensors"
        save_file({name: tensor}, folder / weight_map[name])
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    (folder / "config.json").write_text("{}")
    files = {path.name: file_hash(path) for path in folder.iterdir()}
    write_json(folder / "merge.json", {"format": FORMAT, "files": files})
    return folder


def test_an_intact_model_has_no_problems(tmp_path: Path) -> None:
    problems = verify_model(model(tmp_path / "m"))
    assert problems.problems == [] and problems.tensors == 4 and problems.hashed == 6
    assert problems.bytes == sum(p.stat().st_size for p in (tmp_path / "m").glob("*.safetensors"))


def test_every_problem_is_reported(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", torch.bfloat16)
    shard = folder / "model-a.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    (folder / "config.json").write_text("{} ")
    broken = load_file(folder / "model-c.safetensors")["c.bias"]
    broken[2] = float("nan")
    save_file({"c.bias": broken}, folder / "model-c.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"b.weight"', '"d.weight"'))
    problems = "\n".join(verify_model(folder).problems)
    for message in (
        "model-a.safetensors: was changed after it was written",
        "model-c.safetensors: c.bias contains NaN or infinity",
        "config.json: was changed after it was written",
        "b.weight: the index says None, but it is in model-b.safetensors",
        "d.weight: the index says model-b.safetensors, but it is in None",
    ):
        assert message in problems
    assert "model-b.safetensors: is" not in problems


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_differences_are_sorted_and_measured(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "__defaults__", (1,))  # 64 rows at a time, a rest
    old = model(tmp_path / "old", dtype)
    was = {n: load_file(p)[n] for n in SHAPES for p in [old / f"model-{n[0]}.safetensors"]}
    a, b = was["a.weight"].clone(), was["b.weight"] * 3
    a[129, 69] += 1
    new = model(tmp_path / "new", dtype, **{"a.weight": a, "b.weight": b})
    differences = diff_models(old, new)
    assert [change.name for change in differences.changes] == ["b.weight", "a.weight"]
    assert differences.equal == 2 and differences.incomparable == []
    for change in differences.changes:
        before = was[change.name].double()
        gap = {"a.weight": a, "b.weight": b}[change.name].double() - before
        assert change.old_norm == pytest.approx(float(before.norm()))
        assert change.difference_norm == pytest.approx(float(gap.norm()))
        assert change.greatest == pytest.approx(float(gap.abs().max()))


def test_tensors_without_a_counterpart_are_reported(tmp_path: Path) -> None:
    old = model(tmp_path / "old")
    new = model(
        tmp_path / "new",
        ids=torch.arange(6) + 1,
        **{"c.bias": torch.zeros(6), "d.bias": torch.zeros(1)},
    )
    sentences = "\n".join(diff_models(old, new).incomparable)
    for message in (
        "d.bias: only in",
        "c.bias: [5] and [6]",
        "ids: not equal, and not floats (I64, I64)",
    ):
        assert message in sentences
    assert diff_models(old, old).changes == [] and diff_models(old, old).equal == 4


def test_non_finite_tensors_cannot_be_compared(tmp_path: Path) -> None:
    bad = model(tmp_path / "bad", **{"c.bias": torch.tensor([1, float("nan"), 0, 0, 0])})
    differences = diff_models(model(tmp_path / "good"), bad)
    assert differences.changes == [] and differences.incomparable == [
        "c.bias: contains NaN or infinity"
    ]


def test_tensors_without_elements_are_compared_and_verified(tmp_path: Path) -> None:
    empty = {"e.weight": torch.zeros(5, 0), "f.bias": torch.zeros(0)}
    old, new = (model(tmp_path / name, **empty) for name in ("old", "new"))
    assert not verify_model(old).problems
    differences = diff_models(old, new)
    assert differences.equal == 6 and not differences.changes and not differences.incomparable


def test_a_manifest_of_an_older_dtrain_is_reported(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    write_json(folder / "merge.json", {"files": {}})
    with pytest.raises(UserError, match="an older dtrain wrote it"):
        verify_model(folder)


def in_the_models_layout(
    base: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]
) -> Path:
    """The same model with the names and tensors that it has in memory, without the outer prefix."""
    shutil.copytree(base, folder)
    tensors = dict(plain(base).state_dict())
    change(tensors)
    named = {name.removeprefix("model."): t.clone() for name, t in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_stored_apart_are_compared_with_joined_ones(kind: str, tmp_path: Path) -> None:
    base = write_mixture(tmp_path, kind)
    apart = len(load_file(base / "model.safetensors"))
    same = diff_models(base, in_the_models_layout(base, tmp_path / "same", lambda tensors: None))
    assert not same.changes and not same.incomparable and same.equal < apart

    def change(tensors: dict[str, Tensor]) -> None:
        (name,) = (n for n in tensors if n.endswith("layers.1.mlp.experts.gate_up_proj"))
        tensors[name][2, 20, 5] += 3

    new = in_the_models_layout(base, tmp_path / "new", change)
    for pair in ((base, new), (new, base)):
        differences = diff_models(*pair)
        (changed,) = differences.changes
        assert changed.name == "model.layers.1.mlp.experts.gate_up_proj"
        assert changed.greatest == pytest.approx(3) == changed.difference_norm
        assert differences.equal == same.equal - 1 and not differences.incomparable


def test_matrices_stored_joined_are_compared_with_single_ones(
    tmp_path: Path, save_small: Callable[..., Any]
) -> None:
    save_small("hrm_text", base := tmp_path / "base")
    joined = load_file(base / "model.safetensors").keys()
    assert any(name.endswith("gate_up_proj.weight") for name in joined)

    def change(tensors: dict[str, Tensor]) -> None:
        name = next(n for n in tensors if n.endswith("mlp.up_proj.weight"))
        tensors[name][3, 4] += 3

    differences = diff_models(base, in_the_models_layout(base, tmp_path / "new", change))
    (changed,) = differences.changes
    assert changed.name.endswith("mlp.up_proj.weight")
    assert changed.greatest == pytest.approx(3) and not differences.incomparable


def test_experts_of_other_sizes_are_not_compared(tmp_path: Path) -> None:
    base = write_mixture(tmp_path, "qwen3_moe")
    new = in_the_models_layout(base, tmp_path / "new", lambda tensors: None)
    content = (base / "config.json").read_text()
    (base / "config.json").write_text(
        content.replace('"moe_intermediate_size": 16', '"moe_intermediate_size": 24')
    )
    sentences = diff_models(base, new).incomparable
    assert any(f"experts.3.up_proj.weight: only in {base}" in sentence for sentence in sentences)
    assert any(f"experts.down_proj: only in {new}" in sentence for sentence in sentences)
