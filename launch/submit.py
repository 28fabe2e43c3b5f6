#!/usr/bin/env python
"""Recipes through submitit: launch/submit.py [--executor local] [--nodes N] RECIPE … [key=value …].

Several recipes become one array. Everything else: dtrain/launching/submitit.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dtrain.core.errors import UserError
from dtrain.launching.submitit import submit


def main() -> int:
    """Submit, print the jobs' numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE|key=value")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--folder", default="runs/submitit")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--minutes", type=int, default=24 * 60)
    given = parser.parse_args()
    overrides = [word for word in given.recipes if "=" in word]
    try:
        jobs = submit(
            [word for word in given.recipes if "=" not in word],
            folder=given.folder,
            overrides=overrides,
            executor=given.executor,
            nodes=given.nodes,
            gpus_per_node=given.gpus,
            timeout_minutes=given.minutes,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    for job in jobs:
        print(job.job_id)
    if given.executor == "local":  # nobody else waits for it
        return max(int(job.exception() is not None) for job in jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
