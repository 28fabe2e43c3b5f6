"""Extrapolating a simulation of a few layers, and cases that cannot be simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.methods import Full
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.planning import simulated_peak
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import find_config, find_shape
from dtrain.planning.shapes import join_layers
from dtrain.planning.simulated_peak import (
    SimulatedPeak,
    extrapolate_peak,
    progress_units,
    simulate_step,
    simulated_layers,
    with_layers,
)
from dtrain.planning.workload import Cluster, Workload


def peaks(layers: int, *sizes: tuple[str, str, float, float]) -> list[SimulatedPeak]:
    return [
        SimulatedPeak(
            phase, device, "", fixed + each * layers, {"weights": fixed, "kept": each * layers}
        )
        for phase, device, fixed, each in sizes
    ]


def test_the_greatest_peak_at_the_real_depth_is_found() -> None:
    """The peak phase at the real depth differs from that of a few layers."""
    grows, large = ("backward", "last layer", 10.0, 5.0), ("forward", "outside", 100.0, 1.0)
    peak = extrapolate_peak([peaks(n, grows, large) for n in (3, 4, 5)], (3, 4, 5), 80)
    assert (peak.phase, peak.region, peak.total) == ("backward", "last layer", 410.0)
    assert peak.terms == {"weights": 10.0, "kept": 400.0}


def test_uneven_growth_of_memory_is_reported() -> None:
    series = [peaks(n, ("forward", "outside", 10.0, 5.0 + (n == 5))) for n in (3, 4, 5)]
    with pytest.raises(UserError, match=r"does not grow evenly.*\+5 and \+10 bytes.*forward"):
        extrapolate_peak(series, (3, 4, 5), 80)


def test_uneven_growth_of_a_small_peak_is_ignored() -> None:
    small = [peaks(n, ("update", "outside", 1.0, 0.1 * n)) for n in (3, 4, 5)]
    large = [peaks(n, ("forward", "outside", 10.0, 50.0)) for n in (3, 4, 5)]
    both = [a + b for a, b in zip(small, large, strict=True)]
    assert extrapolate_peak(both, (3, 4, 5), 20).total == 1010.0


def test_a_config_with_fewer_layers_has_shorter_lists() -> None:
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"], "eos_token_id": [1, 2]}
    cut_config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "a"], "eos_token_id": [1, 2]}
    assert with_layers(config, 3) == cut_config


def test_every_name_of_the_number_of_layers_is_cut() -> None:
    assert with_layers({"n_layer": 12, "n_head": 8}, 3) == {"n_layer": 3, "n_head": 8}
    assert with_layers({"vocab_size": 9}, 3) == {"vocab_size": 9, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("layers", "simulated"),
    [
        ("aaaaaaaaaa", (3, 4, 5)),
        ("baaaaaaaaa", (3, 4, 5)),
        ("bbbaaaaaaa", (5, 6, 7)),
        ("aaab" * 10, (8, 12, 16)),
        ("aaab" * 10 + "a", (9, 13, 17)),
        ("aaab" * 3, (12,)),
        ("abacadaeaf", (10,)),
    ],
)
def test_layers_that_repeat_are_simulated_in_whole_repetitions(layers: str, simulated) -> None:
    _, workload = tiny_workload([], 1)
    blocks = [replace(workload.shape, layers=1, mlp=ord(kind)) for kind in layers]
    shape = join_layers(blocks)
    assert simulated_layers(replace(workload, shape=shape)) == simulated


@pytest.mark.parametrize(
    ("depth", "trained", "simulated"),
    [(4, None, (4,)), (6, None, (3, 4, 5)), (9, 3, (5, 6, 7)), (6, 3, (6,)), (6, 6, (3, 4, 5))],
)
def test_layers_that_train_are_the_same_in_each_simulation(depth, trained, simulated) -> None:
    _, workload = tiny_workload([], 1)
    method = Full(kind="full", trainable_layers=trained)
    shape = replace(workload.shape, layers=depth)
    assert simulated_layers(replace(workload, shape=shape, method=method)) == simulated


def test_a_wrapper_has_fewer_layers_in_its_text_model() -> None:
    config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 9}}
    cut_config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 9}}
    assert with_layers(config, 3) == cut_config


MIXTURE = {
    "model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 500,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 96, "intermediate_size": 512,
    "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_mixture_of_experts_is_simulated(tmp_path: Path, method: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    words = [f"model.base={tmp_path}", "model.dtype=bfloat16", "engine.kind=fsdp2"]
    words += [f"stages.domain.method={{kind: {method}, r: 4}}", "model.kernels=auto"]
    words += ["stages.domain.data.sequence_length=1024"]
    planned = build_engine_model(tiny_workload(words, 2)[1]).peak_memory()
    assert simulate_tiny(words, 2).peak.total == pytest.approx(planned.peak, rel=0.1)


def tiny_workload(overrides: list[str], ranks: int) -> tuple[Recipe, Workload]:
    recipe = load_recipe("tiny", ["device=cpu", *overrides])
    cluster = Cluster(find_gpu("h100-80g"), max(1, ranks // 8), min(8, ranks))
    shape, _ = find_shape(recipe.model.base)
    return recipe, build_workload(recipe, recipe.stages[0], shape, cluster)


def simulate_tiny(overrides: list[str], ranks: int) -> simulated_peak.SimulatedStep:
    recipe, workload = tiny_workload(overrides, ranks)
    done: list[int] = []
    config = find_config(recipe.model.base)[0]
    peak = simulate_step(recipe, "domain", workload, config, done.append)
    assert sum(done) == progress_units(workload)
    return peak


DISTILL = [
    "stages.domain.kind=distill",
    'stages.domain.data.sources=[{path: "dtrain:tiny-text/qa.json", format: alpaca}]',
    "stages.domain.data.replay=null",
]


def test_a_model_that_is_its_own_teacher_is_simulated() -> None:
    words = ["engine.kind=ddp", *DISTILL, "stages.domain.distill={teacher: base, ce_weight: 0.5}"]
    planned = build_engine_model(tiny_workload(words, 1)[1]).peak_memory()
    assert simulate_tiny(words, 1).peak.total == pytest.approx(planned.peak, rel=0.1)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_an_engine_that_is_not_simulated_is_reported(engine: str) -> None:
    with pytest.raises(UserError, match=f"{engine} is not simulated"):
        simulate_tiny([f"engine.kind={engine}"], 2)


def test_layers_of_which_some_are_frozen_are_reported() -> None:
    frozen = "stages.domain.method={kind: full, frozen_modules: ['layers.0.mlp']}"
    with pytest.raises(UserError, match="layers that train are alike"):
        simulate_tiny(["engine.kind=ddp", frozen], 1)


def test_missing_torch_is_reported(monkeypatch) -> None:
    monkeypatch.setattr(simulated_peak, "has_torch", lambda: False)
    with pytest.raises(UserError, match="torch, which is not installed"):
        simulate_tiny([], 2)


def test_an_error_of_the_child_is_reported() -> None:
    with pytest.raises(UserError, match="'eager' cannot be simulated"):
        simulate_tiny(["model.attention=eager"], 2)


def test_one_process_simulates_sixteen_ranks() -> None:
    """A sixteenth of the weights is less than what is gathered."""
    words = ["engine.kind=fsdp2", "stages.domain.train.global_batch_size=16"]
    peak = simulate_tiny(words, 16).peak
    assert peak.total == sum(peak.terms.values()) > 0
    assert peak.terms["weights"] < peak.terms["gathered"]
