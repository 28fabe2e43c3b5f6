"""Optimizers of two kinds: Muon with AdamW for the rest, and schedule-free."""

from __future__ import annotations

from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from dtrain.config.schema import Stage
from dtrain.engines.optimizers import (
    build_optimizer,
    result_weight,
    set_learning_rate,
    set_updates_done,
)
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
        list(names), list(parameters), stage(optimizer="muon", weight_decay=0.1), model
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


def test_muon_updates_each_expert_by_itself_and_biases_of_experts_do_not_decay() -> None:
    config = GptOssConfig(
        hidden_size=16, intermediate_size=8, vocab_size=32, head_dim=8, num_attention_heads=2,
        num_key_value_heads=1, num_hidden_layers=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    named = {n: p for n, p in model.named_parameters() if ".experts." in n}
    for parameter in named.values():
        parameter.data.normal_()
    copies = {name: [nn.Parameter(x.clone()) for x in p.detach()] for name, p in named.items()}
    biases = [copy for name in named if name.endswith("bias") for copy in copies[name]]
    matrices = [copy for name in named if name.endswith("proj") for copy in copies[name]]
    assert len(matrices) == len(biases) == 6
    optimizer = build_optimizer(
        [*named], [*named.values()], stage(optimizer="muon", weight_decay=0.1), model
    )
    muon = torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(biases, lr=RATE, weight_decay=0.0)
    for _ in range(3):
        for name, parameter in named.items():
            parameter.grad = torch.randn_like(parameter)
            for copy, gradient in zip(copies[name], parameter.grad, strict=True):
                copy.grad = gradient.clone()
        set_learning_rate(optimizer, RATE)
        for each in (optimizer, muon, adamw):
            each.step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.data, torch.stack(copies[name]).data, msg=name)


def test_schedule_free_is_that_of_its_library_however_often_a_step_calls_it() -> None:
    shapes = [(4, 3), (5,)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer: Any = build_optimizer(
        ["a", "b"], ours, stage(optimizer="schedule_free", weight_decay=0.1), nn.Module()
    )
    library = AdamWScheduleFree(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}], lr=RATE
    )
    library.train()
    groups, square_sum = optimizer.param_groups, 0.0
    for updates, rate in enumerate([RATE / 2, RATE, RATE]):  # with a warm-up
        for group in library.param_groups:
            group["lr"] = rate
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        set_learning_rate(optimizer, rate)
        set_updates_done(optimizer, updates, square_sum)
        for group in groups:  # as ZeRO does
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        square_sum += rate**2
        library.step()
    results = [result_weight(optimizer, p) for p in ours]
    torch.testing.assert_close(ours, theirs)
    library.eval()
    torch.testing.assert_close(results, [p.detach() for p in theirs])
