"""The optimizer that is two: torch's Muon for matrices of layers and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dtrain.config.schema import Stage
from dtrain.engines.optimizers import build_optimizer, set_learning_rate
from dtrain.models.decoder_layers import layer_matrices

RATE = 1e-2


def stage(**train: Any) -> Stage:
    return Stage.model_validate(
        {
            "name": "task",
            "kind": "cpt",
            "method": {"kind": "full"},
            "data": {"sources": [{"path": "a.json"}]},
            "train": {"global_batch_size": 1, "steps": 3, **train},
        }
    )


def test_muon_updates_the_matrices_of_layers_and_adamw_the_rest() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    config = LlamaConfig(num_attention_heads=2, num_hidden_layers=2, **sizes)
    model = LlamaForCausalLM(config)
    names, parameters = zip(*model.named_parameters(), strict=True)
    matrices = [n for n in names if ".layers." in n and "norm" not in n]
    assert sorted(layer_matrices(model)) == sorted(matrices)
    copies = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    optimizer = build_optimizer(
        list(names), list(parameters), stage(optimizer="muon", weight_decay=0.1), matrices
    )
    muon = torch.optim.Muon(
        [copies[n] for n in matrices], lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    decay = {False: 0.0, True: 0.1}
    adamw = torch.optim.AdamW(
        [
            {"params": [copy], "weight_decay": decay[copy.dim() > 1]}
            for name, copy in copies.items()
            if name not in matrices
        ],
        lr=RATE,
    )
    for _ in range(3):
        for name, parameter in zip(names, parameters, strict=True):
            parameter.grad = torch.randn_like(parameter)
            copies[name].grad = parameter.grad.clone()
        set_learning_rate(optimizer, RATE)
        for each in (optimizer, muon, adamw):
            each.step()
    for name, parameter in zip(names, parameters, strict=True):
        torch.testing.assert_close(parameter, copies[name], msg=name)
