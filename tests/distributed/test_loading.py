"""Every engine computes with the values in the base's files; no rank keeps more than its share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SHORT = [
    f"stages.{stage}.train.{setting}"
    for stage in ("domain", "task")
    for setting in ("steps=2", "learning_rate=1e-3", "evaluate_every_steps=2")
]


@pytest.mark.parametrize(
    "cases",
    [
        ["ddp:lora", "fsdp2:lora", "fsdp2:qlora", "fsdp2:full"],
        ["zero2:lora", "zero3:lora", "zero3:qlora", "zero3:full"],
    ],
)
def test_no_rank_keeps_an_unsharded_parameter(start: Callable, cases: list[str]) -> None:
    """FSDP2 frees an original when nothing refers to it: one list would hold a whole 70B base."""
    lines = [line for line in start(2, "load_worker", cases).splitlines() if "FACTS " in line]
    facts = [json.loads(line.split("FACTS ", 1)[1]) for line in lines]
    assert [case_facts["case"] for case_facts in facts] == cases
    assert all(case_facts["filled"] >= 21 and case_facts["kept"] == [] for case_facts in facts), (
        facts
    )


@pytest.fixture
def base(cache: Path, tmp_path: Path, save_small: Callable, start_ranks: Callable) -> Callable:
    """A small base of any type, with the tokenizer of `tiny`."""

    def make(kind: str, **changes: object) -> Path:
        folder = tmp_path / f"base-{kind}"
        save_small(kind, folder, **changes)
        if not (cache / "samples" / "tiny-llama").is_dir():
            start_ranks(*SHORT, ranks=1, folder="samples").wait(0)
        for path in (cache / "samples" / "tiny-llama").glob("*"):
            if "token" in path.name or path.suffix == ".jinja":
                shutil.copy(path, folder)
        return folder

    return make


def store_as_fp8(folder: Path) -> None:
    """Store the weights of a model's linear layers as DeepSeek-V3 does, with one scale each."""
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax().reshape(1, 1) / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path, {"format": "pt"})
    quantization = {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantization))


@pytest.mark.parametrize(
    "kind, engines",
    [("gemma4_text", ["ddp", "fsdp2", "zero2", "zero3"]), ("apertus", ["ddp", "fsdp2", "zero3"]),
     ("gemma3", ["ddp", "fsdp2", "zero3"])],
)  # fmt: skip
def test_engines_agree_on_stored_buffers_and_renamed_files(
    start_ranks: Callable, base: Callable, kind: str, engines: list[str]
) -> None:
    """Both stages: the second one starts from the merged model of the first; one base is in fp8."""
    losses: dict[str, list[float]] = {}
    folder = base(kind)
    if is_coded := kind == "apertus":
        store_as_fp8(folder)
    for engine in engines:
        run = start_ranks(*SHORT, f"model.base={folder}", f"engine.kind={engine}", folder=engine)
        run.wait(0)
        losses[engine] = [float(line.split()[2]) for line in run.losses()]
        artifact = run.json("lineage.json")["artifacts"][0]
        assert artifact["load_peak_memory_bytes"] > 0
        assert "every rank loads the whole base" not in run.output
        assert ("the base is stored in fp8; the merged model is" in run.output) == is_coded
    assert len(losses["ddp"]) == 4
    for engine, engine_losses in losses.items():
        assert engine_losses == pytest.approx(losses["ddp"], abs=1e-5), engine


def test_impossible_merge_is_rejected_before_the_first_step(
    start_ranks: Callable, base: Callable
) -> None:
    folder = base("llama")
    tensors = load_file(folder / "model.safetensors")
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(doubles, folder / "model.safetensors", metadata={"format": "pt"})
    run = start_ranks(*SHORT, f"model.base={folder}").wait(2)
    assert "store it as F64" in run.output and "Traceback" not in run.output
    assert not (run.folder / "domain" / "metrics.jsonl").exists()


def test_deepspeed_file_with_a_wrong_type_is_refused(start_ranks: Callable, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 2, "overlap_comm": [1]}
    file.write_text(json.dumps({"zero_optimization": zero}))
    run = start_ranks(*SHORT, "engine.kind=zero2", f"engine.config={file}").wait(2)
    assert f"{file}: DeepSpeed refuses it: overlap_comm: Input should" in run.output
    assert "Traceback" not in run.output


def test_engines_agree_on_full_training_with_a_frozen_tower(
    start_ranks: Callable, base: Callable
) -> None:
    folder, losses = base("gemma3"), {}
    full = [f"stages.{stage}.method={{kind: full}}" for stage in ("domain", "task")]
    for engine in ("ddp", "fsdp2", "zero3"):
        overrides = [*SHORT, *full, f"model.base={folder}", f"engine.kind={engine}"]
        run = start_ranks(*overrides, folder=engine).wait(0)
        losses[engine] = [float(line.split()[2]) for line in run.losses()]
        assert "parameters stay frozen, as no text reaches them" in run.output
    assert losses["fsdp2"] == pytest.approx(losses["ddp"], abs=1e-5)
    assert losses["zero3"] == pytest.approx(losses["ddp"], abs=1e-5)
