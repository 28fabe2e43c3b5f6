"""Template, tokenise and pack: rows a second against TRL's preparation with two processes.

`python tests/bench/data_prepare.py [FILE of alpaca rows]`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from datasets import Dataset, disable_progress_bars
from trl.data_utils import pack_dataset

from dtrain.config.schema import Data
from dtrain.data.conversations import Conversation
from dtrain.data.prepare import prepare
from dtrain.data.records import read_records
from dtrain.data.sources import find_source_files
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.causal_lm import SupervisedFinetuning
from dtrain.samples.make import ensure

SFT = SupervisedFinetuning.dataset

ROWS, TOKENS, ROUNDS = 8000, 2048, 3


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processors, children's included."""
    started, before = time.perf_counter(), os.times()
    work()
    return time.perf_counter() - started, sum(os.times()[:4]) - sum(before[:4])


def main(path: str) -> None:
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(ensure("tiny-llama"))
        data = Data.model_validate({"sources": [{"path": path}], "sequence_length": TOKENS})
        parts = find_source_files(data.sources[0], folder)
        talks = [
            r.value.messages
            for r in read_records(parts, "auto")
            if isinstance(r.value, Conversation)
        ]
        talks = (talks * (ROWS // len(talks) + 1))[:ROWS]
        many = folder / "many.jsonl"
        many.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        data = Data.model_validate({"sources": [{"path": str(many)}], "sequence_length": TOKENS})
        plain = [[{k: m[k] for k in ("role", "content")} for m in talk] for talk in talks]
        rows = Dataset.from_dict({"messages": plain})

        def encode(row: dict) -> dict:  # as SFTTrainer prepares rows without generation marks
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            prompt = tokenizer.apply_chat_template(
                row["messages"][:-1], tokenize=False, add_generation_prompt=True
            )
            asked = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            mask = [0] * asked + [1] * (len(ids) - asked)
            return {"input_ids": ids[:TOKENS], "completion_mask": mask[:TOKENS]}

        def theirs(round: int) -> None:
            how = {"num_proc": 2, "load_from_cache_file": False}
            mapped = rows.map(encode, remove_columns=["messages"], **how)
            pack_dataset(mapped, TOKENS, strategy="bfd", map_kwargs=how)

        def own(round: int) -> None:
            prepare(data, SFT, tokenizer, "bench", folder / f"cache{round}", 2)

        ratios = []
        for number in range(ROUNDS):
            (mine, my_cpu), (others, others_cpu) = (
                cost(lambda work=work, n=number: work(n)) for work in (own, theirs)
            )
            ratios.append((others / mine, others_cpu / my_cpu))
            print(
                f"dtrain {ROWS / mine:,.0f} rows/s (store written and synced), TRL's way "
                f"{ROWS / others:,.0f}; {ROWS / my_cpu:,.0f} and {ROWS / others_cpu:,.0f} rows "
                "per CPU second",
                flush=True,
            )
    clock, cpu = (median(column) for column in zip(*ratios, strict=True))
    print(f"{clock:.2f}x by the clock, {cpu:.2f}x by CPU time")


if __name__ == "__main__":
    main(sys.argv[1])
