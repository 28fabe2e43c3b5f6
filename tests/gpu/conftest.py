"""What the checks of one GPU share: the device, models of random weights, runs, figures.

Every check takes its device from here. Without a GPU the checks of single functions run on the CPU,
and those that need whole runs are skipped unless `DTRAIN_GPU_TESTS_ON_CPU=1` asks for them, small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
ON_GPU = torch.cuda.is_available()
FIGURES = Path(os.environ.get("DTRAIN_GPU_FIGURES", "gpu-figures.json"))
TIMEOUT_SECONDS = 300

MARKERS = {
    "whole_run": "runs a recipe; on a CPU only if DTRAIN_GPU_TESTS_ON_CPU asks for it",
    "measures_gpu": "its figures mean nothing without a GPU",
}

# Llama-3.1-8B's shape; a small one stands for it where there is no GPU.
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SHAPE = LLAMA_8B if ON_GPU else LLAMA_SMALL


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    small_runs = "DTRAIN_GPU_TESTS_ON_CPU" in os.environ
    for item in items:
        for name, skipped in (("whole_run", not small_runs), ("measures_gpu", True)):
            if item.get_closest_marker(name) and skipped and not ON_GPU:
                item.add_marker(pytest.mark.skip(reason=MARKERS[name]))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", 0) if ON_GPU else torch.device("cpu")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """What a base is held in on this device by default."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, Any]]:
    """What is measured, by name; at the end added to a JSON file of earlier parts."""
    values: dict[str, Any] = {"torch": torch.__version__, "device": "cpu"}
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        values["device"] = torch.cuda.get_device_name(0)
        values["memory_bytes"] = total
        values["free_bytes_at_start"] = free
    yield values
    known = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    FIGURES.write_text(
        json.dumps(known | values, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


@dataclass
class Run:
    """A run that has ended."""

    folder: Path
    status: int
    output: str
    seconds: float

    def losses(self, stage: str) -> list[float]:
        """The loss of each step."""
        return [record["loss"] for record in self.records(stage) if "loss" in record]

    def records(self, stage: str) -> list[dict[str, Any]]:
        """Lines of a stage's metrics.jsonl."""
        text = (self.folder / stage / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line]

    def facts(self, stage: str) -> dict[str, Any]:
        """What the lineage knows of a finished stage."""
        lineage = json.loads((self.folder / "lineage.json").read_text(encoding="utf-8"))
        return next(artifact for artifact in lineage["artifacts"] if artifact["name"] == stage)


def environment(**more: str) -> dict[str, str]:
    """The environment of a run of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", **more}


def torchrun(ranks: int = 1) -> list[str]:
    """The launcher that `dtrain run` uses."""
    options = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "dtrain.torchrun", *options, "-m", "dtrain.train"]


ALONE = [sys.executable, "-m", "dtrain.train"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], Path, Path]]]:
    """Start a recipe; gives the process, its run folder and its log."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(
        recipe: str | Path,
        *overrides: str,
        launched: bool = False,
        folder: str = "run",
        env: dict[str, str] | None = None,
    ) -> tuple[subprocess.Popen[bytes], Path, Path]:
        run_folder, log = tmp_path / folder, tmp_path / f"log-{len(started)}"
        arguments = [str(recipe), *overrides, f"output.folder={run_folder}"]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*(torchrun() if launched else ALONE), *arguments],
                env=environment(**(env or {})),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started.append(process)
        return process, run_folder, log

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def train(start: Callable[..., Any]) -> Callable[..., Run]:
    """Run a recipe to its end, with the status that is expected."""

    def run(recipe: str | Path, *overrides: str, expect: int | None = 0, **more: Any) -> Run:
        began = time.perf_counter()
        process, run_folder, log = start(recipe, *overrides, **more)
        status = process.wait(TIMEOUT_SECONDS)
        output = log.read_text(errors="replace")
        assert expect is None or status == expect, output[-6000:]
        return Run(run_folder, status, output, time.perf_counter() - began)

    return run


@pytest.fixture(scope="session")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8B parameters with random weights on disk, made block by block on the device."""
    folder = tmp_path_factory.mktemp("base")
    write_random_llama(folder, SHAPE)
    return folder


def write_random_llama(folder: Path, shape: dict[str, int]) -> None:
    """Config, tokenizer and bfloat16 weights in Hugging Face layout, a file a layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from dtrain.samples.tiny_llama import build_tokenizer

    build_tokenizer().save_pretrained(folder)
    config = AutoConfig.for_model(
        "llama", **shape, max_position_embeddings=131072, tie_word_embeddings=False,
        dtype="bfloat16", bos_token_id=1, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    device = "cuda" if ON_GPU else "cpu"
    blocks: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        block = ".".join(parts[:3]) if parts[1] == "layers" else "rest"
        values = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
        if parameter.dim() == 2:
            values.normal_(0.0, 0.02)
        blocks.setdefault(block, {})[name] = values.cpu()
    index = {}
    for number, tensors in enumerate(blocks.values(), 1):
        file = f"model-{number:05}-of-{len(blocks):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.fixture(scope="session")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of some hundred to some thousand tokens, enough for all measurements."""
    from dtrain.samples.tiny_text import document

    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    count = 4000 if ON_GPU else 60
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(document(number * 40 + i) for i in range(1 + number % 40))
            file.write(json.dumps({"text": text}) + "\n")
    return path
