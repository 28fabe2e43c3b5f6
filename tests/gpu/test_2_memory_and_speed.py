"""Part 2, eight minutes at most: memory against the plan, waits, tokens a second."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from dtrain.config.load import load_recipe
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import gpu_of_device
from dtrain.planning.known_models import find_shape
from dtrain.planning.workload import Cluster

HERE = Path(__file__).parent
STEPS, WARM_UP_STEPS = 10, 4
TIMEOUT_SECONDS = 300  # of a run
LORA, QLORA, FULL = "{kind: lora, r: 16}", "{kind: qlora, r: 16}", "{kind: full}"
PUBLISHED = 12_473  # tokens/s of an 8B LoRA at 4k on one H100, NeMo AutoModel


@pytest.fixture
def recipe(tmp_path: Path, large_base: Path, long_texts: Path) -> Path:
    """One stage of LoRA on packed texts."""
    stage = {
        "name": "stage", "kind": "cpt", "method": {"kind": "lora", "r": 16, "dropout": 0.0},
        "data": {"sequence_length": 4096, "sources": [{"path": str(long_texts)}]},
        "train": {"global_batch_size": 1, "steps": STEPS, "learning_rate": 1e-4},
    }  # fmt: skip
    model = {"base": str(large_base), "gradient_checkpointing": True}
    whole = {
        "name": "gpu", "model": model, "engine": {"kind": "ddp"}, "stages": [stage],
        "output": {"folder": str(tmp_path / "run"), "merge": False},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(whole))  # JSON is YAML
    return path


def tokens_per_second(run: Any) -> float:
    """Median over the steps after those that compile."""
    rates = [r["tokens_per_second"] for r in run.records("stage") if "loss" in r]
    return median(rates[WARM_UP_STEPS:])


def this_gpu() -> Any:
    name, (_, total) = torch.cuda.get_device_name(0), torch.cuda.mem_get_info()
    return gpu_of_device(name, total)


@pytest.mark.measures_gpu
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_loading_needs_little_memory_beyond_the_base(
    train, recipe, method, engine, figures
) -> None:
    settings = [f"stages.stage.method={method}", f"engine.kind={engine}"]
    facts = train(recipe, *settings, "stages.stage.train.steps=2").facts("stage")
    shape, _ = find_shape(str(load_recipe(str(recipe), settings).model.base))
    linear = 0.516 if "qlora" in method else 2
    base = shape.linear_elements * linear + (shape.parameters - shape.linear_elements) * 2
    layer = 2 * shape.linear_elements / shape.layers
    peak = facts["load_peak_memory_bytes"]
    figures[f"load peak over the base, {method}, {engine}"] = peak / base
    assert peak < 1.05 * base + 3 * layer


@pytest.mark.measures_gpu
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", [LORA, QLORA, FULL], ids=["lora", "qlora", "full"])
def test_planned_memory_matches_the_gpu(
    train, recipe, method, checkpointing, tokens, figures
) -> None:
    settings = [
        f"stages.stage.method={method}",
        f"model.gradient_checkpointing={str(checkpointing).lower()}",
        f"stages.stage.data.sequence_length={tokens}",
        "stages.stage.train.steps=3",
    ]
    loaded = load_recipe(str(recipe), settings)
    shape, _ = find_shape(loaded.model.base)
    workload = build_workload(loaded, loaded.stages[0], shape, Cluster(this_gpu(), 1, 1))
    planned = build_engine_model(workload).peak_memory().peak
    if planned > 0.92 * this_gpu().usable_bytes:
        pytest.skip(f"the plan says {planned / 2**30:.0f} GiB, more than this GPU has")
    run = train(recipe, *settings)
    measured = max(r["peak_memory_bytes"] for r in run.records("stage") if "loss" in r)
    name = f"{method}, checkpointing {checkpointing}, sequences of {tokens}"
    figures[f"measured / planned peak, {name}"] = measured / planned
    assert 0.9 <= measured / planned <= 1.05, (measured, planned)


@pytest.mark.measures_gpu
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_step_synchronizes_at_most_four_times(recipe, tmp_path, method, figures) -> None:
    command = [sys.executable, str(HERE / "count_syncs.py"), str(recipe)]
    command += [f"stages.stage.method={method}", f"output.folder={tmp_path / 'syncs'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (line,) = (x for x in done.stdout.split("\n") if x.startswith("SYNCS "))
    waits = json.loads(line.removeprefix("SYNCS "))
    figures[f"waits of a step, {method}"] = waits
    assert not waits["forward"]
    assert sum(waits["step"].values()) <= 4, waits


@pytest.mark.measures_gpu
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_kernels_train_more_tokens_per_second(train, recipe, method, figures) -> None:
    speeds = {}
    shape, _ = find_shape(load_recipe(str(recipe), []).model.base)
    for kernels in ("auto", "off"):
        settings = [f"stages.stage.method={method}", f"model.kernels={kernels}"]
        speeds[kernels] = tokens_per_second(train(recipe, *settings, folder=kernels))
        mfu = 4 * shape.parameters * speeds[kernels] / (this_gpu().tflops * 1e12)
        figures[f"tokens/s, {method}, kernels {kernels}"] = speeds[kernels]
        figures[f"MFU by 4P, {method}, kernels {kernels}"] = mfu
    figures["published tokens/s, NeMo AutoModel, H100"] = PUBLISHED
    assert speeds["auto"] > speeds["off"]


@pytest.mark.measures_gpu
@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not there")
def test_speed_against_trl(train, recipe, large_base, long_texts, tmp_path, figures) -> None:
    ours = tokens_per_second(train(recipe))
    arguments = [large_base, long_texts, 4096, STEPS, tmp_path / "trl"]
    command = [sys.executable, str(HERE / "train_trl.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (line,) = (x for x in done.stdout.split("\n") if x.startswith("TRL "))
    theirs = json.loads(line.removeprefix("TRL "))
    figures["tokens/s, TRL packed"] = theirs["tokens_per_second"]
    figures["dtrain / TRL, tokens a second"] = ours / theirs["tokens_per_second"]
    assert ours > theirs["tokens_per_second"]


@pytest.mark.measures_gpu
@pytest.mark.timeout(3 * TIMEOUT_SECONDS)
def test_sequences_of_many_documents_are_not_slower(train, recipe, tmp_path, figures) -> None:
    """A sequence of short documents computes less attention, and must not cost more."""
    speeds = {}
    for documents in (1, 8, 64):
        texts = tmp_path / f"{documents}.jsonl"
        write_texts(texts, documents)
        source = f"stages.stage.data.sources=[{{path: {texts}}}]"
        speeds[documents] = tokens_per_second(train(recipe, source, folder=f"of-{documents}"))
        figures[f"tokens/s, sequences of {documents} documents"] = speeds[documents]
    assert min(speeds[8], speeds[64]) >= 0.9 * speeds[1], speeds


def write_texts(path: Path, documents: int) -> None:
    """Texts of which this many fill a sequence of 4096 tokens, enough for all steps."""
    from dtrain.samples.tiny_text import document

    each = max(1, round(4096 / documents / 48))  # 48 tokens a sample
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents * 2 * STEPS):
            text = " ".join(document(number * each + i) for i in range(each))
            file.write(json.dumps({"text": text}) + "\n")


@pytest.mark.measures_gpu
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_first_step_is_faster_with_a_warm_cache(train, recipe, tmp_path, figures) -> None:
    env, seconds = {"DTRAIN_CACHE": str(tmp_path / "cache")}, {}
    for name in ("cold", "warm"):
        run = train(recipe, "stages.stage.train.steps=2", folder=name, env=env)
        first = next(r for r in run.records("stage") if "loss" in r)
        seconds[name] = sum(first["seconds"].values())
        figures[f"seconds of the first step, {name} cache"] = seconds[name]
    assert seconds["warm"] < seconds["cold"]
