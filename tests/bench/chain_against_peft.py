"""A finished run of two LoRA stages against PEFT: weights, logits and greedy tokens, in float32.

    python tests/bench/chain_against_peft.py RUN

Peer: peft's merge_and_unload of one adapter after the other, and the adapters as a stack. Then the
adapters combined into one, exact and cut to smaller ranks, with the error and what it does to the
logits.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtrain.core.weight_files import weight_files
from dtrain.merge.combine_adapters import combine_adapters
from dtrain.serving.run_models import open_run

QUESTION = {"role": "user", "content": "What does `itertools.pairwise` return?"}
NEW_TOKENS = 32


def plain(folder: Path | str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def said(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, list[int]]:
    tokens = model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return model(input_ids=ids).logits, tokens[0].tolist()


def main(folder: Path) -> None:
    run = open_run(folder)
    stages = run.recipe.stages
    adapters = [run.adapter(stage) for stage in stages]
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids

    model = plain(run.base)
    for stage, adapter in zip(stages, adapters, strict=True):
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        theirs, apart, count = model.state_dict(), 0.0, 0
        for path in weight_files(run.merged(stage)):
            for name, ours in load_file(path).items():
                apart = max(apart, float((ours.float() - theirs[name]).abs().max()))
                count += 1
        print(f"{stage.name}: {count} tensors, greatest difference of the weights {apart:.2e}")
    del model

    logits, tokens = said(plain(run.merged(stages[-1])), ids)

    def against(title: str, model: torch.nn.Module) -> None:
        base_logits, base_tokens = said(model.eval(), ids)
        same = "equal" if base_tokens == tokens else "OTHER"
        apart, new = float((base_logits - logits).abs().max()), len(base_tokens) - ids.shape[1]
        print(f"{title}: logits {apart:.2e} apart, {new} greedy tokens {same}", flush=True)

    stacked = PeftModel.from_pretrained(plain(run.base), adapters[0], "a0")
    stacked.load_adapter(adapters[1], "a1")
    stacked.base_model.set_adapter(["a0", "a1"])
    against("base + stack", stacked)
    del stacked
    against("base alone", plain(run.base))
    with tempfile.TemporaryDirectory() as temporary:
        exact = combine_adapters(*adapters, Path(temporary) / "exact")
        sizes = [None, exact.rank * 4 // 5, exact.rank // 2, exact.rank // 5]
        for rank in sizes:
            out = Path(temporary) / f"r{rank}"
            combined = combine_adapters(*adapters, out, rank=rank)
            title = f"combined, rank {combined.rank}, error {combined.error:.2e}"
            against(title, PeftModel.from_pretrained(plain(run.base), out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
