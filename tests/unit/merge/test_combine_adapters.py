"""Two adapters are combined into their exact sum, or into the best lower-rank approximation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.combine_adapters import combine_adapters, nearest_of_rank
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input

Make = Callable[..., Path]
Record = Callable[..., None]
IDS = torch.arange(20)[None]
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
LAYERS = {Q: (64, 64), UP: (96, 64)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def deltas(folder: Path) -> dict[str, Tensor]:
    """What a combined adapter adds, layer by layer; its scale is 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {t.shape[0] for key, t in tensors.items() if ".lora_A" in key}
    assert ranks == {config["r"]}
    names = {key.partition(".lora_")[0] for key in tensors}
    short = {name: name.removeprefix("base_model.model.") for name in names}
    return {short[n]: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


SETTINGS = {
    "plain": ({}, {}),
    "rslora": ({"use_rslora": True}, {"lora_alpha": 7}),
    "patterns": (
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"alpha_pattern": {"layers.1.mlp.up_proj": 9}},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_combined_adapter_equals_two_peft_merges(
    case: str, base: Path, tmp_path: Path, make_adapter: Make
) -> None:
    settings = [{"lora_alpha": 0.1, "base_model_name_or_path": str(base)} | s
                for s in SETTINGS[case]]  # fmt: skip
    first = make_adapter(tmp_path / "a", LAYERS, 8, **settings[0])
    second = make_adapter(tmp_path / "b", {Q: (64, 64)}, 2, **settings[1])
    combine_adapters(first, second, tmp_path / "both")
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = model(IDS).logits
    for folder in (first, second):
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    expected = model(IDS).logits
    combined = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "both"
    )
    assert (combined.eval()(IDS).logits - expected).abs().max() < 1e-4
    assert (expected - plain).abs().max() > 1e-2


def test_truncated_rank_is_the_best_approximation_with_the_reported_error(
    tmp_path: Path, make_adapter: Make
) -> None:
    same = {"base_model_name_or_path": "b"}
    first = make_adapter(tmp_path / "a", LAYERS, 8, **same)
    second = make_adapter(tmp_path / "b", LAYERS, 3, lora_alpha=1, **same)
    combine_adapters(first, second, tmp_path / "exact")
    result = combine_adapters(first, second, tmp_path / "cut", rank=5)
    exact, cut = deltas(tmp_path / "exact"), deltas(tmp_path / "cut")
    gone = sum(float((exact[n] - cut[n]).square().sum()) for n in exact)
    whole = sum(float(t.square().sum()) for t in exact.values())
    assert (
        result.error == pytest.approx((gone / whole) ** 0.5, rel=1e-4) and 0.1 < result.error < 0.9
    )
    for name, delta in exact.items():
        values = torch.linalg.svdvals(delta.double())
        best = float(values[5:].square().sum().sqrt())
        assert float((delta - cut[name]).norm()) == pytest.approx(best, rel=1e-4)
    about = json.loads((tmp_path / "cut" / "combine.json").read_text())
    assert about["relative_error"] == result.error and about["worst_layer"] in LAYERS
    with pytest.raises(UserError, match="the exact sum has only rank 11"):
        combine_adapters(first, second, tmp_path / "new", rank=11)


def test_thin_factors_have_the_singular_values_of_the_full_matrix() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(6, 50), torch.randn(40, 6)
    (down, up), values = nearest_of_rank((a, b), 6)
    assert torch.allclose(values, torch.linalg.svdvals((b @ a).double())[:6])
    assert torch.allclose(up @ down, b @ a, atol=1e-4)


def test_zero_adapter_is_truncated_without_error(tmp_path: Path, make_adapter: Make) -> None:
    folders = [make_adapter(tmp_path / n, {Q: (8, 8)}, 2, base_model_name_or_path="b")
               for n in "ab"]  # fmt: skip
    for folder in folders:
        path = folder / "adapter_model.safetensors"
        save_file({key: torch.zeros_like(t) for key, t in load_file(path).items()}, path)
    result = combine_adapters(*folders, tmp_path / "cut", rank=1)
    assert result.error == 0 and not deltas(tmp_path / "cut")[Q].any()


# --- what belongs together --------------------------------------------------------------------


def stages(tmp_path: Path, make: Make, record: Record, *methods: str, parent: str = "P") -> list:
    folders, identities = [], [parent, "one", "two", "three"]
    for number, method in enumerate(methods):
        stage = tmp_path / f"stage{number}"
        folders.append(make(stage / "adapter", {Q: (8, 8)}, 2, base_model_name_or_path="gone"))
        record(stage, identities[number + 1], identities[number], method)
    return folders


def test_chain_of_three_combines_only_in_order(
    tmp_path: Path, make_adapter: Make, record_stage: Record
) -> None:
    a, b, c = stages(tmp_path, make_adapter, record_stage, "qlora", "lora", "lora")
    with pytest.raises(UserError, match="which is neither"):
        combine_adapters(a, c, tmp_path / "out")
    combine_adapters(a, b, tmp_path / "ab")
    origin = json.loads((tmp_path / "ab" / "combine.json").read_text())["origin"]
    assert origin == {"identity": "two", "parent": "P", "base_in_nf4": True, "kind": "combined"}
    result = combine_adapters(tmp_path / "ab", c, tmp_path / "abc")
    assert result.rank == 6
    with pytest.raises(UserError, match="which is neither"):
        combine_adapters(b, a, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_over_the_merged_model_in_nf4_is_refused(
    tmp_path: Path, make_adapter: Make, record_stage: Record
) -> None:
    a, b = stages(tmp_path, make_adapter, record_stage, "qlora", "qlora")
    with pytest.raises(UserError, match="trained over the merged model in NF4"):
        combine_adapters(a, b, tmp_path / "out")


def test_base_that_records_its_merged_adapters(
    base: Path, tmp_path: Path, make_adapter: Make
) -> None:
    settings = {"base_model_name_or_path": str(base), "target_modules": [*LAYERS]}
    first = make_adapter(tmp_path / "a", LAYERS, 4, **settings)
    unrelated = make_adapter(tmp_path / "c", LAYERS, 4, **settings)
    job = MergeJob(base, tmp_path / "merged", source="s")
    job.merge_adapters([adapter_input(MergeableAdapter.open(first, job.tensors))])
    merged = str(tmp_path / "merged")
    second = make_adapter(tmp_path / "b", LAYERS, 2, base_model_name_or_path=merged)
    assert combine_adapters(first, second, tmp_path / "out").base == str(base)
    with pytest.raises(UserError, match="which is neither"):
        combine_adapters(unrelated, second, tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "with use_dora is not a plain sum"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save is not a plain sum"),
        ({"bias": "all"}, "with bias is not a plain sum"),
        ({"init_lora_weights": "pissa_niter_4"}, "removes a component from the base"),
        ({"peft_type": "IA3"}, "with IA3 is not a plain sum"),
        ({"peft_type": "LOHA"}, "is not the config of an adapter that merges"),
        ({"r": 5}, "ranks of .* disagree"),
        ({"r": 1, "target_parameters": ["experts.down_proj"]}, "is an adapter of experts, which"),
        ({"fan_in_fan_out": True}, "disagree on fan_in_fan_out"),
        ({"base_model_name_or_path": "another"}, "which is neither"),
    ],
    ids=str,
)
def test_adapters_that_are_not_a_sum_are_refused(
    change: dict, match: str, tmp_path: Path, make_adapter: Make
) -> None:
    same = {"base_model_name_or_path": "b"}
    first = make_adapter(tmp_path / "a", {Q: (8, 8)}, 2, **same)
    second = make_adapter(tmp_path / "b", {Q: (8, 8)}, 2, **same | change)
    with pytest.raises(UserError, match=match):
        combine_adapters(first, second, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_broken_tensors_are_refused(tmp_path: Path, make_adapter: Make) -> None:
    same = {"base_model_name_or_path": "b"}
    first = make_adapter(tmp_path / "a", {Q: (8, 8)}, 2, **same)
    second = make_adapter(tmp_path / "b", {Q: (8, 9)}, 2, **same)
    with pytest.raises(UserError, match="has different shapes in the two adapters"):
        combine_adapters(first, second, tmp_path / "out")
    path = second / "adapter_model.safetensors"
    tensors = load_file(path)
    up = next(key for key in tensors if "lora_B" in key)
    save_file(tensors | {up: torch.full_like(tensors[up], float("nan"))}, path)
    with pytest.raises(UserError, match="is not finite"):
        combine_adapters(first, second, tmp_path / "out")
    save_file({up: tensors[up]}, path)
    with pytest.raises(UserError, match="only half of an adapter"):
        combine_adapters(first, second, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is not a complete safetensors file"):
        combine_adapters(first, second, tmp_path / "out")


def test_stop_string_and_template_of_the_last_adapter_are_kept(
    tmp_path: Path, make_adapter: Make
) -> None:
    for name in ("one", "two"):
        folder = make_adapter(tmp_path / name, {"q_proj": (8, 8)}, 2, base_model_name_or_path="b")
        (folder / "generation_config.json").write_text(name)
        if name == "one":
            (folder / "chat_template.jinja").write_text(name)
    combine_adapters(tmp_path / "one", tmp_path / "two", tmp_path / "both")
    assert (tmp_path / "both" / "generation_config.json").read_text() == "two"
    assert (tmp_path / "both" / "chat_template.jinja").read_text() == "one"
