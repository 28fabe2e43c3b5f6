"""A random model of Qwen3-30B-A3B's shape, trained and merged within the memory of the plan.

    python tests/bench/mixture_real.py FOLDER [--layers 4] [--experts 128] [--tokens 256]

The checkpoint stores each expert by itself. Two ranks under fsdp2 stream it, train two steps of
LoRA on every expert, and one process merges. Memory is anonymous and shared memory of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from merge_cost import fields
from merge_models import values_of
from safetensors.torch import save_file

from dtrain.config.load import load_recipe
from dtrain.planning.build_workload import build_workload
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.gpus import find_gpu
from dtrain.planning.known_models import find_shape
from dtrain.planning.storage import RANK_HOST_BYTES, host_merge_bytes
from dtrain.planning.workload import Cluster, Workload
from dtrain.samples.make import ensure

RANKS = 2
GB = 1e9
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    """Write the model, train, merge, and print what each needed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    written = make_model(folder / "base", arguments.layers, arguments.experts)
    recipe = write_recipe(folder, arguments.tokens)
    planned, merge = planned_bytes(recipe)
    shape = planned.shape
    print(f"{shape.parameters:,} parameters, {shape.active_parameters:,} of a token, ", end="")
    print(f"{planned.trainable:,} train; {written / GB:.2f} GB of files", flush=True)
    peak = build_engine_model(planned).peak_memory()
    show("run", [str(recipe)], peak.peak + RANK_HOST_BYTES, f"plan at its {peak.moment}")
    step = max((folder / "run" / "domain" / "checkpoints").iterdir())
    show("merge", [str(step), str(folder / "merged")], merge, "plan of the merge")
    files = [path.stat().st_size for path in (folder / "merged").glob("*.safetensors")]
    print(f"merged: {sum(files) / GB:.2f} GB")


def make_model(folder: Path, layers: int, experts: int) -> int:
    """Write the checkpoint, a file for each layer, with the tokenizer of a sample; its bytes."""
    folder.mkdir(parents=True)
    for path in ensure("tiny-llama").iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_experts": experts, "num_experts_per_tok": 8, "vocab_size": 32000,
        "tie_word_embeddings": False, "dtype": "bfloat16", "norm_topk_prob": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, written = {}, 0
    for number, shapes in enumerate((outer_shapes(), *map(layer_shapes, [experts] * layers))):
        start = f"model.layers.{number - 1}." if number else ""
        file = folder / f"model-{number:05d}.safetensors"
        named = {f"{start}{name}": values_of(x, number) for name, x in shapes.items()}
        save_file(named, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(named, file.name)
        written += file.stat().st_size
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def outer_shapes() -> Shapes:
    """The tensors outside of the layers."""
    matrix = (32000, 2048)
    return {"model.embed_tokens.weight": matrix, "model.norm.weight": (2048,)} | {
        "lm_head.weight": matrix
    }


def layer_shapes(experts: int) -> Shapes:
    """The tensors of a layer, without its prefix."""
    attention = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048)}
    attention |= {"o_proj": (2048, 4096), "q_norm": (128,), "k_norm": (128,)}
    shapes: Shapes = {f"self_attn.{name}.weight": x for name, x in attention.items()}
    shapes |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (2048,))
    shapes["mlp.gate.weight"] = (experts, 2048)
    expert = {"gate_proj": (768, 2048), "up_proj": (768, 2048), "down_proj": (2048, 768)}
    for number in range(experts):
        shapes |= {f"mlp.experts.{number}.{name}.weight": x for name, x in expert.items()}
    return shapes


def write_recipe(folder: Path, tokens: int) -> Path:
    """A recipe of two steps."""
    path = folder / "recipe.yaml"
    path.write_text(f"""\
name: mixture
device: cpu
model: {{base: {folder}/base, dtype: bfloat16, gradient_checkpointing: true}}
engine: {{kind: fsdp2}}
launch: {{processes: {RANKS}}}
stages:
  - name: domain
    kind: cpt
    method: {{kind: lora, r: 8, alpha: 16}}
    data:
      sequence_length: {tokens}
      sources: [{{path: "dtrain:tiny-text/domain.jsonl", format: text}}]
    train: {{global_batch_size: {RANKS}, micro_batch_size: 1, steps: 2, learning_rate: 1.0e-3}}
output: {{folder: {folder}/run, merge: false}}
""")
    return path


def planned_bytes(path: Path) -> tuple[Workload, float]:
    """The workload, and the plan's bytes of a merge."""
    recipe = load_recipe(str(path))
    cluster = Cluster(find_gpu("h100-80g"), 1, RANKS)
    shape = find_shape(recipe.model.base)[0]
    workload = build_workload(recipe, recipe.stages[0], shape, cluster)
    return workload, host_merge_bytes(workload)


def show(verb: str, words: list[str], planned: float, label: str) -> None:
    """Run a command of dtrain; print the most that one of its processes had in memory."""
    began = time.monotonic()
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DTRAIN_CACHE": str(Path(words[0]).parent)}
    child = subprocess.Popen([sys.executable, "-m", "dtrain", verb, *words], env=environ)
    peaks: dict[int, int] = {}
    while child.poll() is None:
        for pid in descendants(child.pid):
            peaks[pid] = max(peaks.get(pid, 0), resident(pid))
        time.sleep(0.02)
    assert child.returncode == 0, child.returncode
    most = max(peaks.values())
    print(
        f"{verb}: {most / GB:.2f} GB in the largest of its processes, {label} {planned / GB:.2f} "
        f"({planned / most - 1:+.1%}), {time.monotonic() - began:.0f} s",
        flush=True,
    )


def descendants(pid: int) -> Iterator[int]:
    """A process and those that it started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended
        return
    for child in children:
        yield from descendants(int(child))


def resident(pid: int) -> int:
    """Bytes of anonymous and shared memory."""
    try:
        status = fields(pid, "status")
    except OSError:
        return 0
    return 1024 * (status.get("RssAnon", 0) + status.get("RssShmem", 0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
