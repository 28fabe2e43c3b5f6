"""Compare the loader with memory-map slices, `datasets` with a collator, and mosaicml-streaming.

`python tests/bench/data_loader.py [PYTHON]`; PYTHON is an interpreter that has mosaicml-streaming,
which reads the same rows. The measure is CPU time per token; rounds alternate.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from dtrain.config.data import Data
from dtrain.data.loader import Loader
from dtrain.data.prepare import prepare
from dtrain.models.tokenizer import load_tokenizer
from dtrain.objectives.causal_lm import ContinuedPretraining
from dtrain.samples.make import ensure

CPT = ContinuedPretraining.dataset

BATCH, ROWS, ROW_TOKENS, ROUNDS, EPOCHS = 8, 1024, 2048, 7, 8
KINDS = ("input_ids", "position_ids", "target_positions", "targets")
STREAMING = """
import json, sys, time
import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
folder, batch, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = np.load(folder + "/raw-input_ids.npy")
with MDSWriter(out=folder + "/mds", columns={"ids": "ndarray:int32:%d" % rows.shape[1]}) as out:
    for row in rows:
        out.write({"ids": row.astype(np.int32)})
data = StreamingDataset(local=folder + "/mds", shuffle=True, batch_size=batch)
def collate(rows):
    ids = torch.from_numpy(np.stack([row["ids"] for row in rows]).astype(np.int64))
    return ids, ids[:, 1:].clone()
seconds = []
for _ in range(rounds):
    started, tokens = time.process_time(), 0
    for ids, _ in DataLoader(data, batch, collate_fn=collate):
        tokens += ids.numel()
    seconds.append((time.process_time() - started) / tokens)
print(json.dumps(sorted(seconds)[len(seconds) // 2]))
"""


def seconds(work: Callable[[], int]) -> float:
    """CPU seconds per token."""
    started = time.process_time()
    tokens = work()
    return (time.process_time() - started) / tokens


def batches(loader: Loader) -> Iterator[dict[str, torch.Tensor]]:
    """All micro-batches as tensors by name."""
    for step in range(loader.steps):
        for batch in loader.micro_batches(step, 0, 1, BATCH):
            yield {kind: getattr(batch, kind) for kind in KINDS}


def prepared(folder: Path, sentences: int) -> Loader:
    """A loader of rows of 2048 tokens; a sentence has about ten tokens."""
    text = "The red fox sees the blue hen by the river. " * sentences
    documents = ROWS * ROW_TOKENS // (10 * sentences)
    (folder / "a.jsonl").write_text(f'{{"text": "{text}"}}\n' * documents)
    source = {"path": str(folder / "a.jsonl"), "format": "text"}
    data = Data.model_validate({"sources": [source], "sequence_length": ROW_TOKENS})
    tokenizer = load_tokenizer(ensure("tiny-llama"))
    dataset = prepare(data, CPT, tokenizer, "bench", folder / f"cache{sentences}")
    rows = dataset.sequences_per_epoch // BATCH * BATCH
    return Loader(dataset, seed=0, global_batch=BATCH, total_sequences=EPOCHS * rows)


class Raw:
    """The same tensors sliced from memory maps that contain nothing else."""

    def __init__(self, folder: Path, loader: Loader) -> None:
        whole = list(islice(batches(loader), loader.steps // EPOCHS))
        widths = {kind: max(b[kind].numel() for b in whole) for kind in KINDS}
        for kind in KINDS:
            rows = [np.resize(b[kind].numpy().reshape(-1), widths[kind]) for b in whole]
            kept = np.stack(rows).reshape(len(rows) * BATCH, -1) if kind == "input_ids" else rows
            np.save(folder / f"raw-{kind}.npy", np.asarray(kept, dtype=np.int32))
        load = np.load
        self.maps = {k: np.asarray(load(folder / f"raw-{k}.npy", mmap_mode="r")) for k in KINDS}
        shuffle = np.random.default_rng(0).permutation
        self.order = np.concatenate([shuffle(len(whole) * BATCH) for _ in range(EPOCHS)])

    def tokens_and_targets(self) -> int:
        """Load the minimum: tokens, and targets shifted by one."""
        tokens, rows = 0, self.maps["input_ids"]
        for start in range(0, len(self.order), BATCH):
            batch = rows[self.order[start : start + BATCH]].astype(np.int64).reshape(-1)
            ids, targets = torch.from_numpy(batch)[None], torch.from_numpy(batch[1:].copy())
            tokens += ids.numel() + 0 * targets.numel()
        return tokens

    def all_tensors(self) -> int:
        """Load what the loader returns: tokens, positions, target positions and targets."""
        tokens = 0
        for start in range(0, len(self.order), BATCH):
            rows = self.order[start : start + BATCH]
            arrays = {"input_ids": self.maps["input_ids"][rows].astype(np.int64).reshape(-1)}
            for kind in KINDS[1:]:
                batch = self.maps[kind][start // BATCH % len(self.maps[kind])]
                arrays[kind] = batch.astype(np.int64)
            tensors = [torch.from_numpy(arrays[kind]) for kind in KINDS]
            tokens += tensors[0][None].numel() + 0 * tensors[1][None].numel()
        return tokens


def datasets_loader(loader: Loader) -> Callable[[], int]:
    """Load with `datasets` and a collator; the incomplete last row is dropped."""
    epoch = islice(batches(loader), loader.steps // EPOCHS)
    ids = torch.cat([batch["input_ids"].view(-1) for batch in epoch])
    rows = ids[: ids.numel() // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS).tolist()
    arrow = Dataset.from_dict({"input_ids": rows, "labels": rows})

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    def run() -> int:
        loaded = DataLoader(arrow, BATCH, shuffle=True, collate_fn=collate)
        return sum(batch["input_ids"].numel() for batch in loaded)

    return run


def main(streaming: str | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sentences in (500, 30):
            loader = prepared(folder, sentences)
            raw = Raw(folder, loader)

            def dtrain_loader(loader: Loader = loader) -> int:
                return sum(batch["input_ids"].numel() for batch in batches(loader))

            works = (
                dtrain_loader,
                raw.tokens_and_targets,
                raw.all_tensors,
                datasets_loader(loader),
            )
            times = [[seconds(work) for work in works] for _ in range(ROUNDS)]
            ours, minimum, same, theirs = (median(column) for column in zip(*times, strict=True))
            print(
                f"documents of {10 * sentences} tokens: {1e-6 / ours:.0f}M tokens per CPU second: "
                f"{same / ours:.2f}x raw slices of the same tensors, {minimum / ours:.2f}x raw "
                f"slices of tokens and targets alone, {theirs / ours:.1f}x datasets with a collator"
            )
            if streaming:
                call = [streaming, "-c", STREAMING, name, str(BATCH), str(ROUNDS)]
                print(f"{json.loads(subprocess.check_output(call)) / ours:.1f}x mosaicml-streaming")
                streaming = None


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
