"""Measure the speed and the memory of a scan on generated rows.

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

from dtrain.config.data import Source
from dtrain.data.records import SourceRows
from dtrain.data.sources import find_source_files
from dtrain.data_quality.report import build_report
from dtrain.data_quality.scan import scan

WORDS = [
    f"{a}{b}"
    for a in ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za"]
    for b in ["nd", "st", "lk", "rm"]
]


def main(rows: int, processes: int = 2) -> None:
    generator = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for number in range(rows):
                question, answer = (" ".join(generator.choices(WORDS, k=k)) for k in (6, 12))
                file.write(
                    json.dumps({"instruction": f"{question} {number}?", "output": f"{answer}."})
                    + "\n"
                )
        files = find_source_files(Source(path=str(path)), Path(name) / "cache")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        result = scan([SourceRows("rows", files, "alpaca")], processes=processes)
        build_report(result)
        seconds = time.perf_counter() - started
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{result.rows:,} rows in {seconds:.0f} s, {result.rows / seconds:,.0f} rows/s with "
        f"{processes} processes; state {result.state_bytes() / result.rows:.0f} bytes per row, "
        f"peak memory +{growth / 1024:.0f} MiB ({1024 * growth / result.rows:.0f} bytes per row)"
    )


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*(arguments or [1_000_000]))
