"""Compare rendering, tokenizing and packing with TRL's preparation, two processes each.

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

from dtrain.config.data import Data
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
        files = find_source_files(data.sources[0], folder)
        conversations = [
            r.value.messages
            for r in read_records(files, "auto")
            if isinstance(r.value, Conversation)
        ]
        conversations = (conversations * (ROWS // len(conversations) + 1))[:ROWS]
        many = folder / "many.jsonl"
        many.write_text(
            "".join(json.dumps({"messages": conversation}) + "\n" for conversation in conversations)
        )
        data = Data.model_validate({"sources": [{"path": str(many)}], "sequence_length": TOKENS})
        plain = [
            [{k: m[k] for k in ("role", "content")} for m in conversation]
            for conversation in conversations
        ]
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

        def trl(round: int) -> None:
            options = {"num_proc": 2, "load_from_cache_file": False}
            mapped = rows.map(encode, remove_columns=["messages"], **options)
            pack_dataset(mapped, TOKENS, strategy="bfd", map_kwargs=options)

        def dtrain(round: int) -> None:
            prepare(data, SFT, tokenizer, "bench", folder / f"cache{round}", 2)

        ratios = []
        for number in range(ROUNDS):
            (ours, our_cpu), (theirs, their_cpu) = (
                cost(lambda work=work, n=number: work(n)) for work in (dtrain, trl)
            )
            ratios.append((theirs / ours, their_cpu / our_cpu))
            print(
                f"dtrain {ROWS / ours:,.0f} rows/s (store written and synced), TRL's way "
                f"{ROWS / theirs:,.0f}; {ROWS / our_cpu:,.0f} and {ROWS / their_cpu:,.0f} rows "
                "per CPU second",
                flush=True,
            )
    clock, cpu = (median(column) for column in zip(*ratios, strict=True))
    print(f"{clock:.2f}x wall, {cpu:.2f}x CPU")


if __name__ == "__main__":
    main(sys.argv[1])
