"""What is kept for the backward pass, as the plan counts it and as autograd does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dtrain.config.load import load_recipe
from dtrain.methods.base import build_method
from dtrain.models.dropout import set_dropout_key
from dtrain.planning.activations import saved_bytes
from dtrain.planning.build_workload import build_workload
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import find_shape
from dtrain.planning.workload import Cluster

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "tie_word_embeddings": False,
}
TOKENS = 32  # few, so that what does not grow with them would show


def really_saved(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the storages that a forward pass saves, apart from parameters and buffers."""
    saved = dict[int, torch.UntypedStorage]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS))
    set_dropout_key(model, 0, 0, [0], [TOKENS])
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model(input_ids=ids)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    assert output.logits.requires_grad
    return sum(storage.nbytes() for key, storage in saved.items() if key not in known)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("{kind: vera, r: 64}", "float32"),
        ("{kind: vera, r: 64}", "bfloat16"),
        ("{kind: full, frozen_modules: [embed_tokens, lm_head, q_proj, down_proj]}", "float32"),
    ],
)
def test_a_method_saves_what_the_plan_says(method, dtype, tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    config.save_pretrained(tmp_path)
    overrides = [
        f"model={{base: {json.dumps(str(tmp_path))}, dtype: {dtype}, kernels: off}}",
        f"stages.domain.method={method}",
        "engine.kind=ddp",
        f"stages.domain.data.sequence_length={TOKENS}",
    ]
    recipe = load_recipe("tiny", overrides)
    shape, _ = find_shape(str(tmp_path))
    cluster = Cluster(find_gpu("h100-80g"), 1, 1)
    workload = build_workload(recipe, recipe.stages[0], shape, cluster)
    base = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).requires_grad_(False)
    model = build_method(recipe.stages[0].method).attach(base, seed=0)
    assert saved_bytes(workload) == pytest.approx(really_saved(model, base.dtype), rel=0.03)
