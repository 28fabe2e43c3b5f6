"""Pack 100,000 documents: fill of the rows, and CPU against TRL's best-fit decreasing.

`python tests/bench/data_packing.py`
"""

from __future__ import annotations

import time

import numpy as np
from datasets import Dataset
from trl.data_utils import pack_dataset

from dtrain.data.packing import pack_whole

DOCUMENTS = 100_000


def lengths(capacity: int) -> np.ndarray:
    """Document lengths like those of instruction data: log-normal, at most a row."""
    drawn = np.random.default_rng(0).lognormal(5.5, 0.9, DOCUMENTS)
    return np.clip(drawn, 8, capacity).astype(np.int64)


def main() -> None:
    for capacity in (2048, 8192):
        sizes = lengths(capacity)
        started = time.process_time()
        plan = pack_whole(sizes, capacity)
        ours = time.process_time() - started
        fill = sizes.sum() / ((plan.rows.size - 1) * capacity)
        data = Dataset.from_dict({"input_ids": [[0] * int(size) for size in sizes]})
        started = time.process_time()
        packed = pack_dataset(data, capacity, strategy="bfd", map_kwargs={"batch_size": DOCUMENTS})
        theirs = time.process_time() - started
        trl = sizes.sum() / (len(packed) * capacity)
        print(
            f"{capacity}: {fill:.5f} full in {ours:.3f} s; TRL {trl:.5f} in {theirs:.2f} s "
            f"(with its copy of the tokens): {theirs / ours:.0f}x"
        )


if __name__ == "__main__":
    main()
