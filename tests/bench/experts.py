"""LoRA on experts: dtrain's routed products against PEFT's target parameters, same layer and steps.

Each runs in a process of its own, in turns; time is CPU time a step, memory the peak above what the
process had before the first step. `python tests/bench/experts.py [EXPERTS]`
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

TURNS = 3
CHILD = """
import json, resource, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from dtrain.models.kernels.experts import route_adapters

torch.set_num_threads(1)
who, experts = sys.argv[1], int(sys.argv[2])
config = AutoConfig.for_model(
    "qwen3_moe", vocab_size=1000, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=experts,
    num_experts_per_tok=4,
)
torch.manual_seed(0)
config._experts_implementation = "eager"
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
names = ["experts.gate_up_proj", "experts.down_proj"]
model = get_peft_model(model, LoraConfig(r=16, target_modules=[], target_parameters=names))
if who == "dtrain":
    for module in model.modules():
        route_adapters(module)
ids = torch.randint(1000, (1, 512))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, times = peak(), []
for _ in range(4):
    started = time.process_time()
    model(input_ids=ids, use_cache=False).logits.square().mean().backward()
    times.append(time.process_time() - started)
print(json.dumps([sorted(times)[1], peak() - before]))
"""


def run(who: str, experts: str) -> tuple[float, int]:
    """CPU seconds a step, and bytes."""
    command = [sys.executable, "-c", CHILD, who, experts]
    seconds, size = json.loads(subprocess.check_output(command).splitlines()[-1])
    return seconds, size


def main() -> None:
    """Print a line for each, and the ratios."""
    experts = sys.argv[1] if len(sys.argv) > 1 else "32"
    rows = {who: [run(who, experts) for _ in range(TURNS)] for who in ("dtrain", "peft")}
    results = {who: [median(values) for values in zip(*x, strict=True)] for who, x in rows.items()}
    for who, (seconds, size) in results.items():
        print(f"{who:7} {experts} experts: {seconds:.3f} CPU s a step, {size / 1e6:.0f} MB")
    (time_a, size_a), (time_b, size_b) = results.values()
    print(
        f"dtrain is {time_b / time_a:.2f} times as fast, with {size_a / size_b:.2f} of the memory"
    )


if __name__ == "__main__":
    main()
