"""Template, tokenise and pack: rows a second against TRL's preparation with two processes.

`python tests/bench/data_prepare.py [FILE of alpaca rows]`
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from datasets import Dataset
from trl.data_utils import pack_dataset

from dtrain.config.schema import Data
from dtrain.data.conversations import Talk
from dtrain.data.formats import read
from dtrain.data.prepare import prepare
from dtrain.data.sources import find_parts
from dtrain.models.tokenizer import load_tokenizer
from dtrain.samples.make import ensure

ROWS, TOKENS = 8000, 2048


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = load_tokenizer(ensure("tiny-llama"))
        data = Data.model_validate({"sources": [{"path": path}], "sequence_tokens": TOKENS})
        parts = find_parts(data.sources[0], folder)
        talks = [r.value.messages for r in read(parts, "auto") if isinstance(r.value, Talk)]
        talks = (talks * (ROWS // len(talks) + 1))[:ROWS]
        many = folder / "many.jsonl"
        many.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
        data = Data.model_validate({"sources": [{"path": str(many)}], "sequence_tokens": TOKENS})
        started = time.perf_counter()
        prepare(data, "sft", tokenizer, "bench", folder / "cache")
        own = time.perf_counter() - started
        plain = [[{k: m[k] for k in ("role", "content")} for m in talk] for talk in talks]
        rows = Dataset.from_dict({"messages": plain})
        started = time.perf_counter()

        def encode(row: dict) -> dict:  # as SFTTrainer prepares rows without generation marks
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            prompt = tokenizer.apply_chat_template(
                row["messages"][:-1], tokenize=False, add_generation_prompt=True
            )
            asked = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            mask = [0] * asked + [1] * (len(ids) - asked)
            return {"input_ids": ids[:TOKENS], "completion_mask": mask[:TOKENS]}

        mapped = rows.map(encode, num_proc=2, remove_columns=["messages"])
        pack_dataset(mapped, TOKENS, strategy="bfd", map_kwargs={"num_proc": 2})
        theirs = time.perf_counter() - started
    print(
        f"dtrain {ROWS / own:,.0f} rows/s (store written and synced), "
        f"TRL's way {ROWS / theirs:,.0f} rows/s: {theirs / own:.2f}x"
    )


if __name__ == "__main__":
    main(sys.argv[1])
