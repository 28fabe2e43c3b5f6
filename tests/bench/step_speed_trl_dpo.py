"""One run of TRL's DPOTrainer for step_speed.py, with its reference computed before the steps.

Its default needs two forward passes of the reference in each step. Padding-free batches, which
would save it the padding, need flash attention and so a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from step_speed import Found
from step_speed_trl import Counting, measure, settings
from trl import DPOConfig, DPOTrainer

PAIRS = 2  # in a step: about the tokens of one of dtrain's sequences


class CountingDpo(Counting, DPOTrainer):
    """The trainer, with the tokens of its steps."""


def main(job: Found) -> None:
    arguments = DPOConfig(
        per_device_train_batch_size=PAIRS, precompute_ref_log_probs=True, **settings(job)
    )
    dataset = rows(job).select(range(PAIRS * (job["steps"] + 1)))
    measure(job, CountingDpo, arguments, dataset)


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
