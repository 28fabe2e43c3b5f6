"""Every causal-LM type of the installed transformers under dtrain; table.txt says what each gets.

    python tests/architectures/sweep.py --write            # all, into table.txt: under an hour
    python tests/architectures/sweep.py llama gemma2 gpt2  # these, against the table
    python tests/architectures/sweep.py --write llama+tied # these, into table.txt

Cases that have a result in --results (default: a folder of the temporary folder) are not run again
with --resume.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import checks
import forks
import models
import torch
import transformers

from dtrain.config import schema
from dtrain.config.methods import Lora
from dtrain.methods.base import build_method
from dtrain.models.load import load_base
from dtrain.rank_main import keep_libraries_quiet
from dtrain.samples.make import ensure

# What ranks import when they need it; pandas by pyarrow, where it is installed.
IMPORTED_LATE = ["dtrain.engines.deepspeed", "dtrain.engines.fsdp2", "pandas"]
TABLE = Path(__file__).with_name("table.txt")
COMMAND = "python tests/architectures/sweep.py --write"
SECONDS = 900
ORDER = {"trains": 0, "refused": 1, "unbuilt": 1, "fault": 2}


def main() -> int:
    """Run the cases, print a line for each, compare with the table or write it."""
    arguments = parse()
    if arguments.missing:
        return tell_missing()
    results = arguments.results
    results.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("DTRAIN_CACHE", str(results / "cache"))
    warm_up()
    cases = chosen(arguments.cases)
    rows = {}
    for number, row in enumerate(rows_of(cases, arguments), 1):
        rows[row["case"]] = row
        print(f"[{number}/{len(cases)}] {line_of(row)}  ({row['seconds']:.0f} s)", flush=True)
    known = read_table()
    if arguments.write:
        write_table(known | {name: line_of(row) for name, row in rows.items()})
        return 0
    worse = [problem for name, row in rows.items() if (problem := regression(known.get(name), row))]
    print("\n".join(worse), file=sys.stderr)
    return 1 if worse else 0


def tell_missing() -> int:
    """Whether table.txt has a line for every case; those of another transformers may stay."""
    names, known = {case.name for case in models.all_cases()}, set(read_table())
    if missing := " ".join(sorted(names - known)):
        print(f"not in table.txt; check what they get, then: {COMMAND} {missing}")
    return int(not names <= known)


def warm_up() -> None:
    """Import and compute once what every fork would; but no gradients, as forks.py says."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a thread of a fork has no pool of OpenMP's
    torch.set_num_threads(1)
    for module in IMPORTED_LATE:
        import_module(module)
    keep_libraries_quiet()
    ensure("tiny-text")
    with tempfile.TemporaryDirectory() as folder:
        models.write(models.Case("llama"), Path(folder))
        settings = schema.Model(base=folder)
        dtype, device = torch.float32, torch.device("cpu")
        for quantized in (False, True):
            base = load_base(
                Path(folder), settings, quantized=quantized, dtype=dtype, device=device
            )
            build_method(Lora(kind="lora")).attach(base, seed=0)
    gc.collect()
    gc.freeze()  # else each fork walks over all that was imported


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names or patterns; all if not given")
    parser.add_argument("--write", action="store_true", help="write table.txt")
    parser.add_argument("--missing", action="store_true", help="only look whether all are in it")
    parser.add_argument("--resume", action="store_true", help="keep the results that are there")
    parser.add_argument("--at-once", type=int, default=2, help="cases at once")
    default = Path(tempfile.gettempdir()) / f"dtrain-architectures-{os.getuid()}"
    parser.add_argument("--results", type=Path, default=default, help="a JSON file a case")
    return parser.parse_args()


def chosen(patterns: list[str]) -> list[models.Case]:
    """The cases that the patterns name."""
    names = [
        c for c in models.all_cases() if not patterns or any(fnmatch(c.name, p) for p in patterns)
    ]
    if not names:
        sys.exit(f"no case is named {', '.join(patterns)}")
    return names


def rows_of(cases: list[models.Case], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each case's row, as it ends; `at_once` of them in processes of their own."""
    waiting = list(reversed(cases))
    running: list[tuple[models.Case, forks.Child]] = []
    while waiting or running:
        while waiting and len(running) < arguments.at_once:
            case = waiting.pop()
            path = arguments.results / f"{case.name}.json"
            if arguments.resume and path.exists():
                yield json.loads(path.read_text())
                continue
            log = arguments.results / f"{case.name}.log"
            log.write_text("")
            work = checks.Checks(case, arguments.results / f"{case.name}.work").all
            running.append((case, forks.start(work, log)))
        if running:
            case, child = running.pop(forks.first_to_end([child for _, child in running]))
            yield kept(case, child, arguments.results)


def kept(case: models.Case, child: forks.Child, results: Path) -> dict[str, Any]:
    status = child.wait(time.monotonic() + SECONDS)
    if status:
        row = checks.asdict(checks.Row(case.name, "fault", faults=["the sweep itself fails"]))
        row["measures"] = {"error": forks.last_line(child.log)}
    else:
        row = child.result()
    child.log.with_suffix(".result").unlink(missing_ok=True)
    (results / f"{case.name}.json").write_text(json.dumps(row, indent=1))
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row as the table holds it."""
    parts = [row["reason"]] if row["reason"] and row["outcome"] != "fault" else []
    text = "; ".join([*row["faults"], *parts, *row["notes"]])
    return f"{row['case']:<28} {row['outcome']:<8} {text}".rstrip()


def read_table() -> dict[str, str]:
    """The lines of table.txt by case."""
    lines = TABLE.read_text().splitlines() if TABLE.exists() else []
    return {line.split()[0]: line for line in lines if line and not line.startswith("#")}


def write_table(lines: dict[str, str]) -> None:
    """Write the cases that there are, sorted."""
    names = {case.name for case in models.all_cases()}
    head = f"# Made by: {COMMAND}\n# transformers {transformers.__version__}\n"
    TABLE.write_text(head + "".join(f"{lines[n]}\n" for n in sorted(lines) if n in names))


def regression(line: str | None, row: dict[str, Any]) -> str:
    """What is worse than the table says; empty if nothing is."""
    name = row["case"]
    if line is None:
        return f"{name} is not in table.txt; check what it gets, then: {COMMAND} {name}"
    before = line.split()[1]
    new = [fault for fault in row["faults"] if fault not in line]
    if ORDER[row["outcome"]] > ORDER[before] or new:
        return f"worse than table.txt:\n  {line}\n  {line_of(row)}\n  {row['measures']}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
