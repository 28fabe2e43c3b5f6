"""Rows a second and memory of a scan, on rows that are made here.

`python tests/bench/data_scan.py [ROWS [PROCESSES]]`
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from dtrain.config.schema import Source
from dtrain.data.sources import find_source_files
from dtrain.data_quality.report import report
from dtrain.data_quality.scan import Input, scan

WORDS = [
    f"{a}{b}"
    for a in ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za"]
    for b in ["nd", "st", "lk", "rm"]
]


def main(rows: int, processes: int) -> None:
    write = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for number in range(rows):
                ask, say = (" ".join(write.choices(WORDS, k=k)) for k in (6, 12))
                file.write(
                    json.dumps({"instruction": f"{ask} {number}?", "output": f"{say}."}) + "\n"
                )
        parts = find_source_files(Source(path=str(path)), Path(name) / "cache")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        found = scan([Input("rows", parts, "alpaca")], processes=processes)
        report(found)
        seconds = time.perf_counter() - started
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{found.rows:,} rows in {seconds:.0f} s, {found.rows / seconds:,.0f} rows/s with "
        f"{processes} processes; state {found.state_bytes() / found.rows:.0f} bytes a row, "
        f"peak memory +{grown / 1024:.0f} MiB ({1024 * grown / found.rows:.0f} bytes a row)"
    )


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(given[0] if given else 1_000_000, given[1] if len(given) > 1 else 2)
