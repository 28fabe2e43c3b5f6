"""Clean a corpus of any size on a Slurm cluster, or on one machine, with datatrove's executors.

    pip install 'dtrain[datatrove]'
    python slurm/clean_corpus.py my.yaml /shared/cleaned --tasks 1000 --partition cpu --time 4:00:00
    python slurm/clean_corpus.py my.yaml cleaned --tasks 8 --local 2

Sources, their formats, the policy (`data.clean`) and the held-out sets are those of a stage of the
recipe. Run it again to go on: finished tasks are not repeated. FOLDER must be yours alone: from
FOLDER/work/logs datatrove's Slurm tasks load their pipeline as a pickle.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

from dtrain.cli.data import chosen_stage
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.core.ownership import own_folder
from dtrain.data_quality.datatrove_pipeline import Step, corpus, settle, steps
from dtrain.pipeline.data_inspection import held_out_of


def main(arguments: list[str]) -> int:
    """Start the pipeline; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        recipe = load_recipe(given.recipe, [])
        data = chosen_stage(recipe, given.stage).data
        inputs, out = corpus(data.sources), given.folder.absolute()
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        settle(inputs, data.clean, own_folder(out), given.tasks)
        jobs = steps(inputs, data.clean, held_out_of(recipe), out, given.tasks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.status)
    run = _here if given.local else _on_slurm
    run(jobs, out, given)
    print(f"rows: {out / 'rows'}; what went, and why: {out / 'quarantine'}")
    return 0


def _here(jobs: list[Step], out: Path, given: argparse.Namespace) -> None:
    for job in jobs:
        LocalPipelineExecutor(
            job.blocks,
            tasks=job.tasks,
            workers=min(given.local, job.tasks),
            logging_dir=str(out / "work" / "logs" / job.name),
        ).run()


def _on_slurm(jobs: list[Step], out: Path, given: argparse.Namespace) -> None:
    """One array for each job; it waits for the array before."""
    before: Any = None
    for job in jobs:
        before = SlurmPipelineExecutor(
            job.blocks,
            tasks=job.tasks,
            time=given.time,
            partition=given.partition,
            mem_per_cpu_gb=given.memory_gb,
            job_name=f"dtrain-{job.name}",
            logging_dir=str(out / "work" / "logs" / job.name),
            slurm_logs_folder=str(out / "work" / "slurm" / job.name),
            depends=before,
            venv_path=None if sys.prefix == sys.base_prefix else f"{sys.prefix}/bin/activate",
            sbatch_args={"account": given.account} if given.account else {},
            mail_type="NONE",
            qos=given.qos,
        )
    before.run()  # which submits those that it depends on first


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", help="of the recipe; the first")
    parser.add_argument("--tasks", type=int, default=8, help="that share the files")
    parser.add_argument("--local", type=int, metavar="WORKERS", help="without Slurm")
    parser.add_argument("--partition", default="cpu")
    parser.add_argument("--qos", default="normal")
    parser.add_argument("--account")
    parser.add_argument("--time", default="24:00:00", help="of a task")
    parser.add_argument("--memory-gb", type=int, default=4, help="of a task")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
