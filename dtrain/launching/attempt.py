"""The two ends of one attempt of a job, for slurm/job.sh: `begin` and `end`.

`begin RECIPE [key=value …]` checks the recipe, takes the run folder, clears away what the last
attempt left, and prints the run folder and the words of the command that trains, each ended by a
NUL. `end RUN STATUS [--warned]` looks at what happened and decides whether Slurm tries again.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from dtrain.config.checks import accumulation
from dtrain.config.load import dump, load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.run_dir import RunDir
from dtrain.core.units import duration
from dtrain.launching import slurm
from dtrain.launching.attempts import (
    Attempt,
    attempts_of,
    close_lost,
    failures_in_a_row,
    write_attempts,
)
from dtrain.launching.commands import step_command
from dtrain.launching.network import rendezvous_endpoint
from dtrain.launching.requeue_policy import Bounds, Ended, Verdict, decide

LOCK_SECONDS = 120  # a worker whose agent was killed may take a while to end
REQUEUE_SECONDS = 600
NEAR_END_SECONDS = 600  # ranks with long steps stop by themselves before Slurm warns


def main(argv: list[str] | None = None) -> int:
    """Run one of the two; return its exit status."""
    arguments = parse(argv)
    try:
        if arguments.part == "begin":
            run, command = begin(arguments.recipe, arguments.overrides, os.environ)
            words = [str(run), *command]
            sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
            return Exit.FINISHED
        return end(Path(arguments.run), arguments.status, arguments.warned, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments of the two parts."""
    parser = argparse.ArgumentParser(prog="dtrain.launching.attempt", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("begin")
    first.add_argument("recipe")
    first.add_argument("overrides", nargs="*")
    last = parts.add_parser("end")
    last.add_argument("run")
    last.add_argument("status", type=int)
    last.add_argument("--warned", action="store_true")
    return parser.parse_args(argv)


def begin(address: str, overrides: list[str], environ: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Make the run folder ready for another attempt; return it and the command that trains.

    Raises:
        UserError: another try cannot help: the recipe is wrong, or it has failed too often.
    """
    recipe = load_recipe(address, overrides)
    run = Path(recipe.output.folder).expanduser().absolute()
    output = recipe.output.model_copy(update={"folder": str(run)})
    recipe = recipe.model_copy(update={"output": output})
    nodes = node_names(environ)
    ranks = ranks_of_a_node(recipe, environ)
    check_batches(recipe, len(nodes), ranks)
    lock = RunDir(run).lock(wait_seconds=LOCK_SECONDS)
    try:
        RunDir(run).reset(dump(recipe))
    finally:
        lock.release()
    attempt = record(run, nodes, environ)
    say(tell_begin(attempt))
    command = step_command(
        RunDir(run).recipe,
        nodes=len(nodes),
        ranks=ranks,
        endpoint=rendezvous_endpoint(environ, nodes[0]),
        rendezvous=secrets.token_hex(8),
        cores=environ.get("SLURM_CPUS_PER_TASK"),
    )
    return run, command


def node_names(environ: Mapping[str, str]) -> list[str]:
    """The nodes of this job, this one first."""
    listed = environ.get("SLURM_JOB_NODELIST")
    if not listed:
        fix = "start it with sbatch, or use: dtrain run"
        raise UserError("this is not a job of Slurm", where="SLURM_JOB_NODELIST", fix=fix)
    return slurm.ask(["scontrol", "show", "hostnames", listed]).split()


def ranks_of_a_node(recipe: Recipe, environ: Mapping[str, str]) -> int | str:
    """Processes on each node: the recipe's; for auto one a GPU that Slurm gave, or one."""
    if recipe.launch.processes != "auto":
        return recipe.launch.processes
    if recipe.device == "cpu":
        return 1
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdecimal() and int(given) else "auto"


def check_batches(recipe: Recipe, nodes: int, ranks: int | str) -> None:
    """Refuse a number of ranks that a batch cannot be shared among, before any of them starts."""
    if isinstance(ranks, str):
        return
    for stage in recipe.stages:
        train = stage.train
        accumulation(train.global_batch_size, nodes * ranks, train.micro_batch)


def record(run: Path, nodes: list[str], environ: Mapping[str, str]) -> Attempt:
    """Write the attempt down, unless those before it say that it is in vain."""
    attempts, job = attempts_of(run), environ["SLURM_JOB_ID"]
    close_lost(attempts)
    attempt = Attempt(
        number=len(attempts) + 1,
        job=job,
        restart=int(environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=nodes,
        log=log_file(),
        started=time.time(),
        progress=RunDir(run).progress(),
    )
    failures = failures_in_a_row(attempts, job, attempt.progress)
    bounds = bounds_from(environ)
    write_attempts(run, [*attempts, attempt] if failures < bounds.failures else attempts)
    if failures >= bounds.failures:  # a job that its node takes away never comes to `end`
        what = f"{failures} tries in a row without a new checkpoint"
        raise UserError(what, where=f"job {job}", fix="look at the log; submit it again to go on")
    return attempt


def bounds_from(environ: Mapping[str, str]) -> Bounds:
    """How often to try, from DTRAIN_MAX_TRIES and DTRAIN_MAX_FAILURES."""
    default = Bounds()
    return Bounds(
        tries=int(environ.get("DTRAIN_MAX_TRIES") or default.tries),
        failures=int(environ.get("DTRAIN_MAX_FAILURES") or default.failures),
    )


def log_file() -> str:
    """The file that this process's stderr goes to; empty if it is none."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return path if path.startswith("/") and not path.startswith("/dev/") else ""


def end(run: Path, status: int, warned: bool, environ: Mapping[str, str]) -> int:
    """Decide what becomes of the job, say so, and requeue it if that can help.

    Returns:
        Exit status of the job, where it ends here.
    """
    attempts, job = attempts_of(run), environ["SLURM_JOB_ID"]
    attempt = attempts[-1]
    warned = warned or is_near_end(environ)
    ended = what_is_known(run, attempts, status, warned, slurm.job_state(job))
    verdict = decide(ended, bounds_from(environ))
    attempt.ended, attempt.outcome = time.time(), verdict.outcome
    attempt.because, attempt.action = verdict.because, verdict.action
    write_attempts(run, attempts)
    say(tell_end(attempt, verdict, ended.reason, RunDir(run).progress()))
    if verdict.action == "requeue":
        slurm.requeue(job)
        time.sleep(REQUEUE_SECONDS)  # until Slurm ends this script
    return verdict.status


def is_near_end(environ: Mapping[str, str]) -> bool:
    """Whether the job's time is nearly over."""
    end_time = environ.get("SLURM_JOB_END_TIME", "")
    return end_time.isdecimal() and int(end_time) - time.time() < NEAR_END_SECONDS


def what_is_known(
    run: Path, attempts: list[Attempt], status: int, warned: bool, job: slurm.JobState
) -> Ended:
    """Gather the facts of the last attempt."""
    attempt, said = attempts[-1], RunDir(run).read_exit_report()
    return Ended(
        status=status,
        outcome=said.get("status"),
        reason=str(said.get("reason", "")),
        warned=warned,
        job=job,
        has_progressed=RunDir(run).progress() != attempt.progress,
        failures=failures_in_a_row(attempts[:-1], attempt.job, attempt.progress),
        tries=attempt.restart + 1,
    )


def tell_begin(attempt: Attempt) -> str:
    """A line for the log."""
    at = ", ".join(f"{stage} {where}" for stage, where in attempt.progress.items()) or "nothing yet"
    return f"attempt {attempt.number} of job {attempt.job} on {', '.join(attempt.nodes)}; at: {at}"


def tell_end(attempt: Attempt, verdict: Verdict, reason: str, progress: dict[str, str]) -> str:
    """A line for the log, with the workers' own reason below it where they failed."""
    took = duration((attempt.ended or attempt.started) - attempt.started)
    at = ", ".join(f"{stage} {where}" for stage, where in progress.items()) or "nothing yet"
    what = {"requeue": "; requeued", "stop": "; not tried again"}.get(verdict.action, "")
    line = f"attempt {attempt.number} ended after {took}: {verdict.because}{what}"
    said = f"\n    {reason}" if reason and verdict.outcome in ("failed", "crashed", "hang") else ""
    return f"{line}; now at: {at}{said}"


def say(message: str) -> None:
    """A line of the job's story, in its log."""
    print(f"dtrain {time.strftime('%H:%M:%S')}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
