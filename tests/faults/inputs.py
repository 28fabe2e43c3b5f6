"""Small real files of every kind that dtrain reads, for `fuzz.py`."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

RECIPE = """\
name: fuzz
model: {base: base, dtype: float32}
launch: {processes: 1}
device: cpu
stages:
  - name: domain
    kind: cpt
    method: {kind: lora, r: 4, alpha: 8, rank_pattern: {q_proj: 2}}
    data: {sequence_length: 64, sources: [{path: rows.jsonl, format: text}]}
    train: {global_batch_size: 2, micro_batch_size: 1, steps: 2, learning_rate: 1.0e-3,
            checkpoint_every_steps: 1}
  - name: task
    kind: sft
    method: {kind: lora, r: 4, alpha: 8}
    data: {sequence_length: 256, sources: [{path: talks.jsonl, format: messages}]}
    train: {global_batch_size: 2, micro_batch_size: 1, steps: 2, learning_rate: 1.0e-3}
evaluation:
  sets:
    held: {kind: cpt, sequence_length: 64, sources: [{path: rows.jsonl, format: text}]}
  generation:
    answers: {path: prompts.jsonl, columns: {prompt: prompt, completion: answer}, limit: 2,
              max_new_tokens: 4, metrics: [exact_match]}
output: {folder: run}
"""
MANY = """\
name: many
model: {base: base}
engine: {kind: fsdp2}
launch: {processes: 2}
stages:
  - name: facts
    kind: cpt
    method: {kind: full}
    data:
      sequence_length: 64
      sources: [{path: rows.jsonl, format: text, weight: 0.5}, {path: rows.csv, format: text}]
      clean: {duplicates: drop}
    train: {global_batch_size: 4, epochs: 1, learning_rate: 1.0e-5, warmup_ratio: 0.1}
  - name: chosen
    kind: dpo
    method: {kind: dora, r: 4, alpha: 8, target_modules: [q_proj, v_proj],
             alpha_pattern: {v_proj: 4}}
    data: {sequence_length: 256, sources: [{path: pairs.jsonl, format: preference}]}
    train: {global_batch_size: 4, steps: 3, learning_rate: 1.0e-5}
output: {folder: runs/many, keep_checkpoints: 2}
"""
SWEEP = """\
recipe: recipe.yaml
parameters:
  stages.domain.train.learning_rate: log(1e-5, 1e-3)
  stages.domain.method.r: [2, 4]
trials: 3
search: random
folder: sweep
"""
RECORD_SWEEP = """\
from pathlib import Path
from dtrain.config.sweep import load_sweep
from dtrain.sweep.record import SeedRun, SweepDir, Trial, open_record
from dtrain.config.load import load_recipe
folder, sweep = SweepDir(Path("sweep").absolute()), load_sweep("sweep.yaml", {})
record = open_record(folder, sweep, load_recipe("recipe.yaml"))
values = {"stages.domain.train.learning_rate": 1e-4, "stages.domain.method.r": 2}
run = SeedRun(name="trials/0000", seed=0, state="complete", value=6.5, seconds=5.0)
points = [(1, 6.6), (2, 6.5)]
trial = Trial(number=0, parameters=values, state="complete", runs=[run], points=points)
record.trials.append(trial)
record.write(folder)
"""
ATTEMPT: dict[str, Any] = {
    "number": 1, "job": "17", "restart": 0, "nodes": ["a"], "log": "run/slurm/job.log",
    "started": 1.7e9, "progress": {"domain": "step-000001"}, "ended": 1.7e9 + 60,
    "outcome": "finished", "reason": "finished", "action": "stop",
}  # fmt: skip


def build_inputs(folder: Path) -> None:
    """Write the files, and make a run with them; half a minute."""
    folder.mkdir(parents=True)
    _write_rows(folder)
    _write_queue(folder / "bin")
    environment = os.environ | {"DTRAIN_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    dtrain = [sys.executable, "-m", "dtrain"]
    made = subprocess.run([*dtrain, "model", "fetch", "tiny-llama"], env=environment, check=True,
                          stdout=subprocess.PIPE, text=True)  # fmt: skip
    shutil.copytree(made.stdout.strip().split("\n")[-1], folder / "base")
    _write_recipes(folder)
    subprocess.run([*dtrain, "run", "recipe.yaml"], env=environment, cwd=folder, check=True)
    subprocess.run([sys.executable, "-c", RECORD_SWEEP], env=environment, cwd=folder, check=True)
    shutil.copytree(folder / "run", folder / "other")
    shutil.copytree(folder / "run" / "domain" / "adapter", folder / "adapter")
    _name_base(folder / "adapter" / "adapter_config.json")
    _shard(folder / "base", folder / "sharded")
    _encode(folder / "base", folder / "coded")
    slurm = folder / "run" / "slurm"
    slurm.mkdir()
    slurm.joinpath("attempts.json").write_text(json.dumps([ATTEMPT]))
    slurm.joinpath("jobs.json").write_text(json.dumps([{"job": "17", "kind": "job"}]))
    slurm.joinpath("job.log").write_text("12:00:00 stage domain: 1/2, 1 s left\n")


def _write_rows(folder: Path) -> None:
    rows = [{"text": f"The hen number {i} sleeps on the hill of {i * 7} trees."} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    folder.joinpath("rows.jsonl").write_text(lines)
    folder.joinpath("rows.json").write_text(json.dumps({"data": rows}, indent=1))
    folder.joinpath("rows.txt").write_text("\n\n".join(row["text"] for row in rows))
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(folder / f"rows{suffix}", "w", newline="") as file:
            writer = csv.DictWriter(file, ["text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / "rows.parquet")
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    _write_conversations(folder)


def _write_conversations(folder: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": f"Who is {i}?"},
                      {"role": "assistant", "content": f"It is hen {i}."}]}
        for i in range(20)
    ]  # fmt: skip
    pairs = [{"prompt": f"Who is {i}?", "chosen": f"Hen {i}.", "rejected": "No."} for i in range(9)]
    prompts = [{"prompt": f"Who is {i}?", "answer": f"Hen {i}."} for i in range(3)]
    for name, rows in (("talks", talks), ("pairs", pairs), ("prompts", prompts), ("out", [])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        folder.joinpath(f"{name}.jsonl").write_text(text)


def _write_recipes(folder: Path) -> None:
    folder.joinpath("recipe.yaml").write_text(RECIPE)
    folder.joinpath("many.yaml").write_text(MANY)
    folder.joinpath("sweep.yaml").write_text(SWEEP)
    zero = RECIPE.replace("device: cpu", "engine: {kind: zero2, config: ds.json}")
    folder.joinpath("zero.yaml").write_text(zero)
    shutil.copy(Path(__file__).parents[2] / "ds_configs" / "zero2.json", folder / "ds.json")


def _write_queue(folder: Path) -> None:
    """A Slurm without jobs."""
    folder.mkdir()
    for name in ("squeue", "sacct", "scontrol", "sbatch"):
        folder.joinpath(name).write_text("#!/bin/sh\nexit 0\n")
        folder.joinpath(name).chmod(0o755)


def _name_base(path: Path) -> None:
    content = json.loads(path.read_text())
    content |= {"base_model_name_or_path": "base", "alpha_pattern": {"v_proj": 4}}
    path.write_text(json.dumps(content, indent=2))


def _shard(base: Path, target: Path) -> None:
    """The same model in two files with an index."""
    shutil.copytree(base, target)
    (target / "model.safetensors").unlink()
    with safe_open(base / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names, weight_map = sorted(tensors), {}
    for file_name, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, target / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _encode(base: Path, target: Path) -> None:
    """The same model in fp8, with experts in MXFP4 that it does not need."""
    shutil.copytree(base, target)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        rows, columns = (-(size // -16) for size in tensors[name].shape)
        tensors[f"{name}_scale_inv"] = torch.ones(rows, columns)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["experts_blocks"] = torch.ones(2, 4, 1, 16, dtype=torch.uint8)
    tensors["experts_scales"] = torch.full((2, 4, 1), 127, dtype=torch.uint8)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    path = target / "config.json"
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
