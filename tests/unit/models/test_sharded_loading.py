"""Streaming a base layer by layer loads every tensor of its files once, in its dtype."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dtrain.config import schema
from dtrain.core.errors import Exit, UserError
from dtrain.models.load import load_base
from dtrain.models.sharded_loading import StreamedModel, stream_base

CPU = torch.device("cpu")
FILE = "model.safetensors"


def stream(
    folder: Path, quantized: bool = False, dtype: torch.dtype = torch.float32, **more: Any
) -> StreamedModel:
    settings = schema.Model(base=str(folder), **more)
    return stream_base(folder, settings, quantized=quantized, dtype=dtype, device=CPU)


def filled(folder: Path, **settings: Any) -> Any:
    streamed = stream(folder, **settings)
    streamed.materialize(streamed.model)
    return streamed.model


def whole(folder: Path, *, quantized: bool = False, **more: Any) -> nn.Module:
    settings = schema.Model(base=str(folder), **more)
    return load_base(folder, settings, quantized=quantized, dtype=torch.float32, device=CPU)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 24)[None], use_cache=False).logits


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def test_a_tied_base_is_streamed(tmp_path: Path, save_small: Callable) -> None:
    save_small("llama", tmp_path, tie_word_embeddings=True)
    model = filled(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_differing_stored_matrices_are_untied(tmp_path: Path, save_small: Callable) -> None:
    save_small("llama", tmp_path, tie_word_embeddings=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    model = filled(tmp_path)
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / FILE)["lm_head.weight"])
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_streamed_layer_unpacks_to_the_compute_dtype(tmp_path: Path, save_small: Callable) -> None:
    """Unpacking to float32 would need three times the memory of the largest matrix."""
    save_small("llama", tmp_path)
    weight = filled(tmp_path, quantized=True, dtype=torch.bfloat16).model.layers[0].mlp.down_proj
    assert weight.weight.quant_state.dtype == torch.bfloat16


@pytest.mark.parametrize("load", [filled, whole])
@pytest.mark.parametrize(
    "kind", ["gemma4_text", "apertus", "gemma3", "gemma4", "mistral3", "qwen2_5_vl", "gpt2"]
)
def test_every_entry_that_a_text_needs_is_loaded(
    tmp_path: Path, save_small: Callable, kind: str, load: Any
) -> None:
    """Buffers such as Gemma 4's layer_scalar too, under whatever names the files have."""
    saved = save_small(kind, tmp_path)
    model, expected = load(tmp_path, attention="eager"), saved.state_dict()
    towers = {name for name in expected if re.search("vis(ion|ual)|multi_modal", name)}
    assert bool(towers) == (kind in ("gemma3", "gemma4", "mistral3", "qwen2_5_vl"))
    assert model.state_dict().keys() == expected.keys() - towers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name, buffer in model.named_buffers():  # those that no file has
        assert torch.equal(saved.get_buffer(name), buffer), name
    torch.testing.assert_close(logits(model), logits(saved), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("load", [filled, whole])
def test_files_without_an_image_tower_are_reported(
    tmp_path: Path, save_small: Callable, load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_small("gemma3", tmp_path)
    load(tmp_path)
    assert "outside the language model" not in capsys.readouterr().out
    edit(tmp_path, lambda tensors: [tensors.pop(n) for n in [*tensors] if "vision_tower" in n])
    load(tmp_path)
    output = " ".join(capsys.readouterr().out.split())
    assert "outside the language model are missing, such as model.vision_tower" in output


@pytest.mark.parametrize("kind", ["gemma4_text", "apertus"])
def test_buffers_are_loaded_with_nf4_and_bfloat16(
    tmp_path: Path, save_small: Callable, kind: str
) -> None:
    save_small(kind, tmp_path)
    for settings in ({"quantized": True}, {"dtype": torch.bfloat16}):
        model = filled(tmp_path, **settings)
        dtype = settings.get("dtype", torch.float32)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for name, buffer in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
            assert model.get_buffer(name).dtype == buffer.dtype


@pytest.mark.parametrize("load", [stream, "load_base"])
def test_missing_and_unexpected_tensors_are_refused(
    tmp_path: Path, save_small: Callable, load: Any
) -> None:
    save_small("gemma4_text", tmp_path)
    if load == "load_base":

        def load(folder: Path) -> object:
            settings = schema.Model(base=str(folder))
            return load_base(folder, settings, quantized=False, dtype=torch.float32, device=CPU)

    scalar = "model.layers.1.layer_scalar"
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.1.extra": torch.ones(2)}))
    with pytest.raises(UserError, match=r"1 tensors are in the files but not .*1\.extra"):
        load(tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop("model.layers.1.extra"), tensors.pop(scalar)])
    with pytest.raises(UserError, match=rf"1 tensors are missing: {scalar}"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_quantized_tensors_are_refused(
    tmp_path: Path, save_small: Callable, dtype: torch.dtype
) -> None:
    save_small("llama", tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UserError, match=rf"{name} is stored as .*8.*quantized"):
        stream(tmp_path)


def test_tensors_that_transformers_ignores_are_no_error(
    tmp_path: Path, save_small: Callable
) -> None:
    save_small("llama", tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda tensors: tensors.update({old: torch.ones(8)}))
    filled(tmp_path)


def test_materialized_tensors_are_freed_once_replaced(tmp_path: Path, save_small: Callable) -> None:
    """Else every rank would keep the whole base in addition to its shards."""
    save_small("llama", tmp_path, tie_word_embeddings=True)
    streamed = stream(tmp_path)
    model, alive = streamed.model, []
    for block in [*model.model.layers, model]:
        streamed.materialize(block)
        for module in block.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and parameter.numel():
                    alive.append(weakref.ref(parameter))
                    module._parameters[leaf] = nn.Parameter(torch.empty(0), requires_grad=False)
        del parameter
    gc.collect()
    assert alive and not [entry for entry in alive if entry() is not None]


def test_parameters_kept_in_float32_stay_so_in_bfloat16(
    tmp_path: Path, save_small: Callable
) -> None:
    save_small("llama", tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path).__class__
    before = kept._keep_in_fp32_modules_strict
    try:
        kept._keep_in_fp32_modules_strict = {"norm"}
        model = filled(tmp_path, dtype=torch.bfloat16)
    finally:
        kept._keep_in_fp32_modules_strict = before
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("load", [filled, whole])
def test_base_that_is_not_finite_is_refused_by_tensor_and_file(
    tmp_path: Path, save_small: Callable, load: Callable, quantized: bool, value: float
) -> None:
    """A single NaN would make every loss NaN; packed into 4 bits it would become a number."""
    save_small("llama", tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    edit(tmp_path, damage)
    with pytest.raises(UserError, match=f"{FILE}: {name} contains NaN or infinity") as error:
        load(tmp_path, quantized=quantized)
    assert error.value.status == Exit.NON_FINITE
