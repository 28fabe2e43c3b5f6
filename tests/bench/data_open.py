"""Time to open a store, to load its first batch, and to resume in the middle, up to 1e12 tokens.

The stores have the real format, but their plans are sparse files: opening costs what it reads.
`python tests/bench/data_open.py`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from dtrain.core.files import write_sealed
from dtrain.data.packing import SEGMENT
from dtrain.data.sampling import build_sampling_plan
from dtrain.data.store import PLAN_FILES, SHARD, SUMS, TOTALS, shard_name

ROW_TOKENS = 2048
SIZES = (10**6, 10**9, 10**12)
REPEATS = 5
CHILD = """
import json, sys, time
from pathlib import Path
import pyarrow as pa
from dtrain.data.loader import Loader
from dtrain.data.sampling import build_sampling_plan
from dtrain.data.packed_dataset import PackedDataset, PreparedSource
from dtrain.data.sources import SourceFile
from dtrain.data.store import Store

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

folder = Path(sys.argv[1])
pa.array([1]).to_numpy()  # imports pandas at its first call
before, started = resident(), time.process_time()
store = Store(folder)
part = SourceFile("p", ".jsonl", "x")
sampling = build_sampling_plan([store.sequences], {0: [None]}, ["s"])
mixture = PackedDataset([PreparedSource("s", [part], store)], sampling, 2048)
loader = Loader(mixture, seed=1, global_batch=8, total_sequences=store.sequences)
first = next(iter(loader.micro_batches(0, 0, 1, 8)))
opened = time.process_time()
middle = next(iter(loader.micro_batches(loader.steps // 2, 0, 1, 8)))
done = time.process_time()
assert first.input_ids.shape == middle.input_ids.shape == (1, 8 * 2048)
print(json.dumps([opened - started, done - opened, resident() - before]))
"""


def make(folder: Path, rows: int) -> None:
    """Write a store whose rows all contain the same document."""
    folder.mkdir()
    lists = pa.LargeListArray.from_arrays
    tokens = pa.array(np.arange(ROW_TOKENS, dtype=np.int32))
    batch = pa.record_batch(
        {
            "tokens": lists(pa.array([0, ROW_TOKENS], pa.int64()), tokens),
            "target_runs": lists(
                pa.array([0, 2], pa.int64()), pa.array([1, ROW_TOKENS], pa.int32())
            ),
            "file_index": pa.array([0], pa.int32()),
            "row_number": pa.array([1], pa.int64()),
            "label": pa.array([0], pa.int32()),
        }
    ).replace_schema_metadata({b"dtrain": b"{}"})
    with pa.ipc.new_file(str(folder / shard_name(0)), batch.schema) as file:
        file.write_batch(batch)
    plan(folder, rows)
    names = (*PLAN_FILES, SUMS)
    (folder / SUMS).write_text("")
    files = {name: {"bytes": (folder / name).stat().st_size, "blake3": ""} for name in names}
    manifest = dict.fromkeys(TOTALS, ROW_TOKENS) | {"sequences": rows, "documents": 1}
    manifest |= {"counts": {}, "fingerprint": "x", "files": files}
    write_sealed(folder / "store.json", manifest)


def plan(folder: Path, rows: int) -> None:
    """Write sparse arrays with the rows of the first and of the middle batch only."""
    kinds = {"segments.npy": SEGMENT, "sequences.npy": "<i8", "sequence_tokens.npy": "<i4"}
    kinds |= {"sequence_targets.npy": "<i4", "sequence_examples.npy": "<i4"}
    arrays = {}
    for name, kind in kinds.items():
        shape = (rows + (name == "sequences.npy"),)
        arrays[name] = np.lib.format.open_memmap(folder / name, "w+", kind, shape)
    for row in loaded_rows(rows):
        arrays["sequences.npy"][row : row + 2] = [row, row + 1]
        arrays["segments.npy"][row] = (0, 0, ROW_TOKENS)
        arrays["sequence_tokens.npy"][row] = ROW_TOKENS
        arrays["sequence_targets.npy"][row] = ROW_TOKENS - 1
        arrays["sequence_examples.npy"][row] = 1
    table = np.zeros(1, SHARD)
    table[0] = 0, (folder / shard_name(0)).stat().st_size
    np.save(folder / "shards.npy", table)


def loaded_rows(rows: int) -> list[int]:
    """Indices of the rows that the child process reads."""
    mixed, middle = build_sampling_plan([rows], {0: [None]}, ["s"]), -(-rows // 8) // 2 * 8
    positions = np.concatenate([np.arange(8), np.arange(middle, middle + 8)])
    return mixed.sequence_ids_at(positions, 1).tolist()


def measure(folder: Path) -> list[float]:
    """Medians of the seconds to the first batch, of the seconds of a resume, and of the bytes."""
    runs = [
        json.loads(subprocess.check_output([sys.executable, "-c", CHILD, str(folder)]))
        for _ in range(REPEATS)
    ]
    return [median(values) for values in zip(*runs, strict=True)]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        results = {}
        for size in SIZES:
            make(Path(name) / str(size), max(size // ROW_TOKENS, 16))
            results[size] = measure(Path(name) / str(size))
    base = results[SIZES[0]]
    for size, (opening, resume, memory) in results.items():
        print(
            f"{size:.0e} tokens: open + first batch {1e3 * opening:.2f} ms "
            f"({opening / base[0]:.2f}x), resume {1e3 * resume:.2f} ms ({resume / base[1]:.2f}x), "
            f"memory {memory / 1e6:.1f} MB ({(memory - base[2]) / 1e6:+.1f})"
        )


if __name__ == "__main__":
    main()
