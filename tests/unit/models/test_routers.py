"""The routers of a mixture of experts: frozen, or trained whole, saved and merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.methods.base import build_method
from dtrain.models import expert_layers
from dtrain.models.load import read_config
from dtrain.models.peft_format import file_key
from dtrain.pipeline.initial_adapter import check_initial_adapter
from tests.unit.models.mixtures import EXPERTS, OTHERS, adapted, logits, plain, saved, write_mixture


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write(kind)` → the folder of a small random model."""
    return partial(write_mixture, tmp_path)


def test_routers_stay_frozen(write: Callable) -> None:
    folder = write("hunyuan_v1_moe")
    _, model = adapted(folder)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any(".experts." in name for name in trained)
    assert not any(".wg." in name for name in trained)
    with pytest.raises(UserError, match=r"gate\.wg is a router, which gets no adapter"):
        adapted(folder, target_modules=["q_proj", "wg"])


@pytest.mark.parametrize("kind", [*OTHERS])
def test_routers_are_frozen_or_trained_whole(write: Callable, kind: str) -> None:
    def in_routers(names: Iterable[str]) -> set[str]:
        return {name for name in names if re.search(r"\.(gate|router)\.", name)}

    def trained(model: nn.Module) -> dict[str, nn.Parameter]:
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    folder = write(kind)
    names = in_routers(dict(plain(folder).named_parameters()))
    assert len(names) >= 2
    full = build_method(Full(kind="full")).attach(plain(folder), seed=1)
    for model in (full, adapted(folder)[1]):
        assert trained(model) and not in_routers(trained(model))
    _, model = adapted(folder, router="train")
    logits(model).square().mean().backward()
    copies = {n: p for n, p in trained(model).items() if "modules_to_save" in n}
    expected = {n for n in names if "moe_statics" not in n}  # which no loss depends on
    assert {file_key(n).removeprefix("base_model.model.") for n in copies} == expected
    assert all(p.grad is not None and p.dtype == torch.float32 for p in copies.values())


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "zaya"])
def test_a_router_that_trained_is_loaded_merged_and_continued(
    write: Callable, kind: str, tmp_path: Path
) -> None:
    folder = write(kind)
    method, model = adapted(folder, router="train")
    with torch.no_grad():
        for name, copy in model.named_parameters():
            if "modules_to_save" in name:
                copy.mul_(1.5)
    adapter = saved(method, model, tmp_path / "adapter")
    job = MergeJob(folder, tmp_path / "merged", source="test")
    job.merge_adapters([adapter_input(MergeableAdapter.open(adapter, job.tensors))])
    for other in (PeftModel.from_pretrained(plain(folder), adapter), plain(tmp_path / "merged")):
        torch.testing.assert_close(logits(other), logits(model), rtol=1e-4, atol=1e-4)
    keys = {"kind": "lora", "r": 4, "dropout": 0.0, "from_adapter": str(adapter)}
    assert check_initial_adapter(SimpleNamespace(method=Lora(**keys)), model)


def test_a_mixture_whose_router_is_not_found_is_refused(
    write: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write("zaya")
    monkeypatch.setattr(expert_layers, "recorded_routers", lambda _: (0, []))
    with pytest.raises(UserError, match=r"what chooses among model\.layers\.0\.mlp\.experts"):
        read_config(folder, trust_remote_code=False)


def test_a_router_that_trains_has_the_bias_of_its_base(write: Callable) -> None:
    folder = write("glm4_moe")
    tensors = load_file(folder / "model.safetensors")
    biases = {n: torch.rand(EXPERTS) for n in tensors if n.endswith("e_score_correction_bias")}
    save_file(tensors | biases, folder / "model.safetensors", metadata={"format": "pt"})
    _, model = adapted(folder, router="train")
    copies = [m for n, m in model.named_modules() if n.endswith("gate.modules_to_save.default")]
    found = [copy.e_score_correction_bias for copy in copies]
    assert len(found) == 2 and all(map(torch.equal, found, biases.values()))
