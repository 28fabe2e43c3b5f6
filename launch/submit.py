#!/usr/bin/env python
"""Submit recipes through submitit: `launch/submit.py [--nodes N] RECIPE … [key=value …]`.

Several recipes become one array. The rest is in dtrain/submitit_jobs.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.pipeline.input_checks import check_inputs
from dtrain.submitit_jobs import submit


def main() -> int:
    """Submit the recipes, print the jobs' ids."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE|key=value")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--folder", default="runs/submitit")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--minutes", type=int, default=24 * 60)
    arguments = parser.parse_args()
    overrides = [text for text in arguments.recipes if "=" in text]
    recipes = [text for text in arguments.recipes if "=" not in text]
    try:
        for recipe in recipes:
            check_inputs(load_recipe(recipe, overrides)).raise_errors()
        jobs = submit(
            recipes,
            folder=arguments.folder,
            overrides=overrides,
            executor=arguments.executor,
            nodes=arguments.nodes,
            gpus_per_node=arguments.gpus,
            timeout_minutes=arguments.minutes,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    for job in jobs:
        print(job.job_id)
    if arguments.executor != "local":
        return 0
    failed = [job for job in jobs if job.exception() is not None]  # this process alone waits for it
    for job in failed:
        print(f"error: job {job.job_id} failed\n    → see {job.paths.stderr}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
