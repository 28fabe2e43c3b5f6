"""One run of TRL's DPOTrainer for step_speed.py, with its reference computed before the steps.

Its default needs two forward passes of the reference in each step. Padding-free batches, which
would save it the padding, need flash attention and so a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from step_speed import Found, finish
from step_speed_trl import Marks, model
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from dtrain.core.cache_paths import cache_folder

PAIRS = 2  # in a step: about the tokens of one of dtrain's sequences


class Counting(DPOTrainer):
    """The trainer; it counts tokens that are not padding."""

    marks: Marks

    def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        self.marks.seen += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **more)


def main(job: Found) -> None:
    base = cache_folder() / "samples" / "smollm2-135m"
    arguments = DPOConfig(
        output_dir=job["folder"],
        max_length=job["tokens"],
        per_device_train_batch_size=PAIRS,
        max_steps=job["steps"] + 1,
        precompute_ref_log_probs=True,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=job["checkpointing"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    marks = Marks()
    trainer = Counting(
        model=model(base, job["method"]),
        args=arguments,
        train_dataset=rows(job).select(range(PAIRS * (job["steps"] + 1))),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=job["dropout"], target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[marks],
    )  # fmt: skip
    trainer.marks = marks
    trainer.train()
    finish(job, marks.found)


def rows(job: Found) -> Dataset:
    """The same pairs, as prompts with two answers."""
    pairs = json.loads(Path(job["data"]).read_text(encoding="utf-8"))
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": pair["prompt"]}],
                "chosen": [{"role": "assistant", "content": pair["chosen"]}],
                "rejected": [{"role": "assistant", "content": pair["rejected"]}],
            }
            for pair in pairs
        ]
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
