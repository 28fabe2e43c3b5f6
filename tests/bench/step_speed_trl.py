"""One run of TRL's SFTTrainer for step_speed.py, in the form that costs it least.

packed: rows of best-fit packing; padded: its default, documents filled up to the longest.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from step_speed import Found, finish
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from dtrain.core.cache_paths import cache_folder

PADDED_DOCUMENTS = 8  # a batch of TRL's default


class Marks(TrainerCallback):
    """The clocks before each step and after the last; `seen` counts a step's tokens."""

    def __init__(self) -> None:
        self.found: list[Found] = []
        self.seen = 0

    def on_step_begin(self, *args: Any, **more: Any) -> None:
        self.record_step()

    def on_train_end(self, *args: Any, **more: Any) -> None:
        self.record_step()

    def record_step(self) -> None:
        if self.found:
            self.found[-1]["tokens"] = self.seen
        self.seen = 0
        now = {"cpu": time.process_time(), "wall": time.perf_counter(), "tokens": 0}
        self.found.append(now)


class Counting:
    """Part of a trainer: it counts tokens that are not padding."""

    marks: Marks

    def training_step(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.marks.seen += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return super().training_step(model, inputs, *args, **more)  # type: ignore[misc]


class CountingSft(Counting, SFTTrainer):
    """The trainer, with the tokens of its steps."""


def main(job: Found) -> None:
    packed = job["name"] == "packed"
    arguments = SFTConfig(
        packing=packed,
        per_device_train_batch_size=1 if packed else PADDED_DOCUMENTS,
        **settings(job),
    )
    measure(job, CountingSft, arguments, rows(job))


def settings(job: Found) -> dict[str, Any]:
    """The arguments of TRL's trainers that do not depend on the rows."""
    return {
        "output_dir": job["folder"],
        "max_length": job["tokens"],
        "max_steps": job["steps"] + 1,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": job["checkpointing"],
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def measure(job: Found, trainer_class: Any, arguments: Any, dataset: Dataset) -> None:
    """Train SmolLM2 and write down what the steps cost."""
    base = cache_folder() / "samples" / "smollm2-135m"
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=job["dropout"],
        use_dora="dora" in job["method"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    marks = Marks()
    trainer = trainer_class(
        model=model(base, job["method"]),
        args=arguments,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=None if job["method"] == "full" else lora,
        callbacks=[marks],
    )
    trainer.marks = marks
    trainer.train()
    finish(job, marks.found)


def model(base: Path, method: str) -> Any:
    """SmolLM2 in float32, or its linear layers in NF4."""
    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        quantization_config=packed if method in ("qlora", "qdora") else None,
    )


def rows(job: Found) -> Dataset:
    """The same documents: questions with answers, or texts."""
    text = Path(job["data"]).read_text(encoding="utf-8")
    if job["kind"] == "cpt":
        return Dataset.from_dict({"text": [t for t in text.split("\n\n") if t.strip()]})
    parsed = json.loads(text)
    asked = [f"{row['instruction']}\n{row.get('input', '')}".strip() for row in parsed]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": question}] for question in asked],
            "completion": [[{"role": "assistant", "content": row["output"]}] for row in parsed],
        }
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
