"""A merge finds its tensors under the names of the files, or is refused before training."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.core_model_loading import Chunk

from dtrain.config import schema
from dtrain.config.methods import Full, Lora
from dtrain.core.errors import UserError
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob, TrainedWeights, check_mergeable
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.methods.base import Method, build_method
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.load import load_base
from dtrain.models.sharded_loading import stream_base

WRAPPERS = ["gemma3", "gemma4", "mistral3", "qwen2_5_vl"]
PROCESSOR = {"preprocessor_config.json": '{"do_resize": true}', "chat_template.json": "{}"}
FILE = "model.safetensors"
IDS = torch.arange(4, 24)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def plain(folder: Path) -> nn.Module:
    """The whole model, as transformers loads it."""
    config = AutoConfig.from_pretrained(folder)
    known = type(config) in AutoModelForMultimodalLM._model_mapping
    loader = AutoModelForMultimodalLM if known else AutoModelForCausalLM
    return loader.from_pretrained(folder, attn_implementation="eager")


def train(base: Path, folder: Path, method: Method) -> nn.Module:
    settings = schema.Model(base=str(base), attention="eager")
    quantized, cpu = method.traits.quantizes_base, torch.device("cpu")
    model = load_base(base, settings, quantized=quantized, dtype=torch.float32, device=cpu)
    adapted = method.attach(model, seed=0)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.05)
    method.save(folder, adapted, {n: p.detach() for n, p in trained.items()})
    return adapted


@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "hrm_text", "mamba", "gemma3n_text"])
def test_merged_wrapper_equals_the_adapter_on_its_base(
    tmp_path: Path, save_small: Callable, wrapper: str, kind: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_small(wrapper, base)
    for name, text in PROCESSOR.items():
        (base / name).write_text(text)
    method = build_method(Lora(kind=kind, r=4, dropout=0.0))
    adapted = train(base, tmp_path / "adapter", method)
    check_mergeable(base, method.changed_tensors(adapted))
    job = MergeJob(base, out, source="test")
    nf4 = Nf4Base(job.tensors, torch.float32) if kind == "qlora" else None
    adapter = MergeableAdapter.open(tmp_path / "adapter", job.tensors)
    job.merge_adapters([adapter_input(adapter, quantized_base=nf4)])
    torch.testing.assert_close(logits(plain(out)), logits(adapted), atol=1e-5, rtol=1e-5)
    assert all((out / name).read_text() == text for name, text in PROCESSOR.items())
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    before, after = load_file(base / FILE), load_file(out / FILE)
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and not [n for n in changed if re.search("vis(ion|ual)|multi_modal", n)]
    if kind == "lora":
        peft = PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert get_peft_model_state_dict(peft).keys() == stored.keys()
        torch.testing.assert_close(logits(peft), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "hrm_text"])
def test_full_weights_of_a_wrapper_keep_the_tensor_names_of_its_files(
    tmp_path: Path, save_small: Callable, wrapper: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    save_small(wrapper, base)
    method = build_method(Full(kind="full"))
    model = method.attach(plain(base), seed=0)
    trained = {n: p.detach().add_(0.01) for n, p in model.named_parameters() if p.requires_grad}
    check_mergeable(base, method.changed_tensors(model))

    def read(name: str, start: int, stop: int) -> Tensor:
        return trained[name].flatten()[start:stop]

    shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    assert all(prod(shape) for shape in shapes.values())
    weights = TrainedWeights(shapes, read, content_hash="trained")
    MergeJob(base, out, source="test").replace_weights(weights)
    torch.testing.assert_close(logits(plain(out)), logits(model), atol=1e-5, rtol=1e-5)
    for name, buffer in plain(base).named_buffers():
        assert torch.equal(plain(out).get_buffer(name), buffer)


def test_a_rule_that_does_more_than_to_move_values_is_refused(
    tmp_path: Path, save_small: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HRM's queries, keys and values are one tensor in its files."""
    save_small("hrm_text", tmp_path)
    method = build_method(Lora(kind="lora", r=2))
    model = method.attach(plain(tmp_path), seed=0)
    chunk = Chunk.convert

    def convert(self: Chunk, tensors: Any, **known: Any) -> dict[str, Tensor]:
        return {name: 2 * values for name, values in chunk(self, tensors, **known).items()}

    monkeypatch.setattr(Chunk, "convert", convert)
    with pytest.raises(UserError, match=r"another layout, .* Chunk does more than to move values"):
        check_mergeable(tmp_path, method.changed_tensors(model))


@pytest.fixture
def turned(tmp_path: Path, save_small: Callable) -> Path:
    """Qwen3-VL's published files hold each expert as [in, out], transformers as [out, in]."""
    saved, base = save_small("qwen3_vl_moe", tmp_path / "turned"), tmp_path / "turned"
    tensors = load_file(base / FILE)
    experts = {n: t.transpose(1, 2).contiguous() for n, t in tensors.items() if ".experts." in n}
    assert experts
    save_file(tensors | experts, base / FILE, metadata={"format": "pt"})
    torch.testing.assert_close(logits(streamed(base)), logits(saved), atol=1e-5, rtol=1e-5)
    return base


def streamed(base: Path, *, quantized: bool = False, method: Method | None = None) -> nn.Module:
    """The model, with a new adapter if there is a method."""
    settings, cpu = schema.Model(base=str(base), attention="eager"), torch.device("cpu")
    source = stream_base(base, settings, quantized=quantized, dtype=torch.float32, device=cpu)
    model = method.attach(source.model, seed=0, device=cpu) if method else source.model
    source.materialize(model)
    if method:
        method.on_weights_loaded(model)
    return model


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_of_experts_that_the_files_have_turned_are_merged(
    tmp_path: Path, turned: Path, kind: str
) -> None:
    method, out = build_method(Lora(kind=kind, r=4, dropout=0.0)), tmp_path / "out"
    model = streamed(turned, quantized=kind == "qlora", method=method)
    patch_modules(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.05)
    check_mergeable(turned, method.changed_tensors(model))
    method.save(tmp_path / "adapter", model, {n: p.detach() for n, p in trained.items()})
    job = MergeJob(turned, out, source="test")
    nf4 = Nf4Base(job.tensors, torch.float32) if kind == "qlora" else None
    adapter = MergeableAdapter.open(tmp_path / "adapter", job.tensors)
    job.merge_adapters([adapter_input(adapter, quantized_base=nf4)])
    assert any(".experts." in name for name in adapter.experts)
    torch.testing.assert_close(logits(streamed(out)), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(streamed(turned)), logits(model), atol=1e-2)
    before, after = load_file(turned / FILE), load_file(out / FILE)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}


def test_full_weights_of_experts_that_the_files_have_turned_are_written_turned(
    tmp_path: Path, turned: Path
) -> None:
    model, out = streamed(turned), tmp_path / "out"
    for same in (True, False):
        trained = {
            n: p.detach() if same else p.detach() + 0.01 for n, p in model.named_parameters()
        }
        check_mergeable(turned, trained)

        def read(name: str, start: int, stop: int, of: dict[str, Tensor] = trained) -> Tensor:
            return of[name].flatten()[start:stop]

        weights = TrainedWeights({n: tuple(t.shape) for n, t in trained.items()}, read, str(same))
        MergeJob(turned, out / str(same), source="test").replace_weights(weights)
        if same:
            assert (out / "True" / FILE).read_bytes() == (turned / FILE).read_bytes()
    loaded = dict(streamed(out / "False").named_parameters())
    assert all(torch.equal(loaded[name], values) for name, values in trained.items())
