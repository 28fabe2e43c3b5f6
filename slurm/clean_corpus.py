"""Clean a corpus of any size on a Slurm cluster, or on one machine, with datatrove's executors.

    pip install 'dtrain[datatrove]'
    python slurm/clean_corpus.py my.yaml /shared/cleaned --tasks 1000 --partition cpu --time 4:00:00
    python slurm/clean_corpus.py my.yaml cleaned --tasks 8 --local 2

Sources, their formats, the policy (`data.clean`) and the held-out sets are those of a stage of the
recipe. Run it again to continue: finished tasks are not repeated. Only you may have write access to
FOLDER: datatrove's Slurm tasks load their pipeline as a pickle from FOLDER/work/logs.
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
from dtrain.core.ownership import check_own_folder
from dtrain.data_quality.datatrove_pipeline import (
    PipelineJob,
    build_jobs,
    check_settings,
    open_corpus,
)
from dtrain.pipeline.data_inspection import held_out_of


def main(arguments: list[str]) -> int:
    """Start the pipeline; return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, [])
        data = chosen_stage(recipe, options.stage).data
        sources, out = open_corpus(data.sources), options.folder.absolute()
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_settings(sources, data.clean, check_own_folder(out), options.tasks)
        held_out = held_out_of(recipe)
        jobs = build_jobs(sources, data.clean, held_out, out, options.tasks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.status)
    run = _run_locally if options.local else _run_on_slurm
    run(jobs, out, options)
    print(f"rows: {out / 'rows'}; removed rows, with reasons: {out / 'quarantine'}")
    return 0


def _run_locally(jobs: list[PipelineJob], out: Path, options: argparse.Namespace) -> None:
    for job in jobs:
        LocalPipelineExecutor(
            job.blocks,
            tasks=job.tasks,
            workers=min(options.local, job.tasks),
            logging_dir=str(out / "work" / "logs" / job.name),
        ).run()


def _run_on_slurm(jobs: list[PipelineJob], out: Path, options: argparse.Namespace) -> None:
    """Submit one job array per job; each waits for the one before it."""
    previous: Any = None
    for job in jobs:
        previous = SlurmPipelineExecutor(
            job.blocks,
            tasks=job.tasks,
            time=options.time,
            partition=options.partition,
            mem_per_cpu_gb=options.memory_gb,
            job_name=f"dtrain-{job.name}",
            logging_dir=str(out / "work" / "logs" / job.name),
            slurm_logs_folder=str(out / "work" / "slurm" / job.name),
            depends=previous,
            venv_path=None if sys.prefix == sys.base_prefix else f"{sys.prefix}/bin/activate",
            sbatch_args={"account": options.account} if options.account else {},
            mail_type="NONE",
            qos=options.qos,
        )
    previous.run()  # submits the jobs that it depends on first


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", help="stage of the recipe; default: the first")
    parser.add_argument("--tasks", type=int, default=8, help="number of tasks that share the files")
    parser.add_argument("--local", type=int, metavar="WORKERS", help="run here, without Slurm")
    parser.add_argument("--partition", default="cpu")
    parser.add_argument("--qos", default="normal")
    parser.add_argument("--account")
    parser.add_argument("--time", default="24:00:00", help="per task")
    parser.add_argument("--memory-gb", type=int, default=4, help="per task")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
