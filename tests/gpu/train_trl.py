"""Worker: the same LoRA steps by TRL's SFTTrainer; prints tokens a second and the peak."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WARM_UP_STEPS = 4


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **more: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main(base: str, texts: str, tokens: int, steps: int, folder: str) -> None:
    """Packed rows of `tokens`, one a step, as dtrain trains them in the same test."""
    clock = Clock()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": 0}),
        args=SFTConfig(
            output_dir=folder, max_length=tokens, packing=True, max_steps=steps, bf16=True,
            per_device_train_batch_size=1, gradient_checkpointing=True, report_to=[],
            save_strategy="no", learning_rate=1e-4, disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=texts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    measured = len(clock.ends) - WARM_UP_STEPS
    seconds = clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]
    peak = torch.cuda.max_memory_allocated()
    print("TRL " + json.dumps({"tokens_per_second": measured * tokens / seconds, "peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
