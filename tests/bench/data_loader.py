"""The loader against raw memory-map slices and `datasets` with a collator, tokens a second.

`python tests/bench/data_loader.py`
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from data_open import ROW_TOKENS
from datasets import Dataset
from torch.utils.data import DataLoader

from dtrain.config.schema import Data
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.models.tokenizer import load_tokenizer
from dtrain.samples.make import ensure

BATCH, ROWS, ROUNDS = 8, 512, 7


def seconds(work: Callable[[], int]) -> float:
    """CPU seconds for a token."""
    started = time.process_time()
    tokens = work()
    return (time.process_time() - started) / tokens


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "The red fox sees the blue hen by the river. " * 500
        (folder / "a.jsonl").write_text(f'{{"text": "{text}"}}\n' * 220)
        tokenizer = load_tokenizer(ensure("tiny-llama"))
        source = {"path": str(folder / "a.jsonl"), "format": "text"}
        data = Data.model_validate({"sources": [source], "sequence_tokens": ROW_TOKENS})
        mixture = prepare(data, "cpt", tokenizer, "bench", folder / "cache")
        rows = min(ROWS, mixture.rows_per_epoch) // BATCH * BATCH
        loader = Loader(mixture, seed=0, global_batch=BATCH, total_rows=rows)
        ids = [mixture.row(n).input_ids.tolist() for n in range(rows)]
        ids = [(row + [0] * ROW_TOKENS)[:ROW_TOKENS] for row in ids]
        np.save(folder / "raw.npy", np.array(ids, np.int32))
        arrow = Dataset.from_dict({"input_ids": ids, "labels": ids})
        order = np.random.default_rng(0).permutation(rows)

        def own() -> int:
            return sum(
                batch.input_ids.numel()
                for step in range(loader.steps)
                for batch in loader.micro_batches(step, 0, 1, BATCH)
            )

        def raw() -> int:
            """The least a loader must do: the tokens, and the targets one further."""
            array, tokens = np.load(folder / "raw.npy", mmap_mode="r"), 0
            for start in range(0, rows, BATCH):
                batch = array[order[start : start + BATCH]].astype(np.int64).reshape(-1)
                ids, targets = torch.from_numpy(batch)[None], torch.from_numpy(batch[1:].copy())
                tokens += ids.numel() + 0 * targets.numel()
            return tokens

        def usual() -> int:
            def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
                return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

            batches = DataLoader(arrow, BATCH, shuffle=True, collate_fn=collate)
            return sum(batch["input_ids"].numel() for batch in batches)

        times = [[seconds(work) for work in (own, raw, usual)] for _ in range(ROUNDS)]
    mine, mapped, theirs = (median(column) for column in zip(*times, strict=True))
    print(
        f"loader {1e-6 / mine:.1f}M tokens per CPU second: {mapped / mine:.2f}x raw slices, "
        f"{theirs / mine:.1f}x datasets with a collator"
    )


if __name__ == "__main__":
    main()
