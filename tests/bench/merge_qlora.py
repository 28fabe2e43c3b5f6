"""Logits of a QLoRA adapter's merged models, for both choices of base, against the trained model's.

    python tests/bench/merge_qlora.py RUN [--stage domain] [--tokens 512]

RUN is a run folder whose first stage is qlora. The trained model is the base in 4 bits with the
adapter on it; both merged models are plain ones in the base's dtype.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtrain.config.load import load_recipe
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.merge import MergeJob
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.models.hub import base_folder
from dtrain.models.load import load_base

TEXT = Path(__file__).parents[2] / "README.md"


def main() -> None:
    """Print how far each merged model's logits are from the trained one's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--stage", default="domain")
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    recipe = load_recipe(str(arguments.run / "recipe.yaml"))
    base, adapter = base_folder(recipe.model.base), arguments.run / arguments.stage / "adapter"
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer(TEXT.read_text())["input_ids"][: arguments.tokens]])
    cpu, dtype = torch.device("cpu"), torch.float32
    packed = load_base(base, recipe.model, quantized=True, dtype=dtype, device=cpu)
    trained = answer(PeftModel.from_pretrained(packed, adapter), ids)
    for name in ("dequantized", "original"):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            job = MergeJob(base, out, source="bench")
            packing = Nf4Base(job.tensors, dtype) if name == "dequantized" else None
            opened = MergeableAdapter.open(adapter, job.tensors)
            job.merge_adapters([adapter_input(opened, quantized_base=packing)])
            merged = answer(AutoModelForCausalLM.from_pretrained(out, dtype=dtype), ids)
        print_difference(name, trained, merged)


@torch.no_grad()
def answer(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, V]."""
    logits: Tensor = model.eval()(ids).logits[0]
    return logits.double()


def print_difference(name: str, trained: Tensor, merged: Tensor) -> None:
    """Print one line."""
    gap = (merged - trained).abs()
    before, after = (x.log_softmax(-1) for x in (trained, merged))
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    same = (trained.argmax(-1) == merged.argmax(-1)).double().mean()
    print(
        f"{name:12} logits off by {gap.max():.2e} at most, {gap.mean():.2e} on average; "
        f"KL {divergence:.2e}; the same greedy token at {same:.1%}"
    )


if __name__ == "__main__":
    main()
