"""Check every node of a job before its first step.

First without torch, in seconds: srun starts node_probe.py on each node, node_checks.py compares the
reports. Then all ranks do an all-reduce (distributed/all_reduce_check.py). A fault ends the job;
with DTRAIN_PREFLIGHT=exclude another job replaces it, without the nodes at fault.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from dtrain.config.schema import Recipe
from dtrain.core.files import parse_json_lines, write_atomic
from dtrain.core.run_dir import RunDir
from dtrain.launching import slurm
from dtrain.launching.attempts import Attempt, read_attempts, write_attempts
from dtrain.launching.commands import ranks_per_node, step_command
from dtrain.launching.container import python_command, srun_options
from dtrain.launching.network import rendezvous_endpoint
from dtrain.launching.node_checks import Fault, Report, find_faults

NODES_SECONDS = 90
START_SECONDS = 600  # until a rank is up: torch from a cold network file system takes minutes
END_SECONDS = 10  # until srun has ended after SIGTERM
RANKS_SECONDS = 180  # from the last rank that is up to the sum
_SPEEDS = "gigabytes_per_second"  # key of the first rank's line
# Option of sbatch → what a running job knows of it, so that a successor asks for the same.
_SAME = {
    "nodes": "SLURM_JOB_NUM_NODES",
    "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT",
    "qos": "SLURM_JOB_QOS",
    "job-name": "SLURM_JOB_NAME",
    "gpus-per-node": "SLURM_GPUS_PER_NODE",
    "cpus-per-task": "SLURM_CPUS_PER_TASK",
    "mem": "SLURM_MEM_PER_NODE",
}


def check_allocation(
    recipe: Recipe, recipe_file: Path, folder: Path, allocation: slurm.Allocation
) -> list[Fault]:
    """Check every node of this job, then all ranks together; log and return what is wrong.

    Args:
        recipe: of the job.
        recipe_file: the same, resolved, in a folder that all nodes should see.
        folder: another one that all nodes should see.
        allocation: the nodes.
    """
    started, nodes = time.monotonic(), allocation.nodes
    reports = probe_nodes(recipe, recipe_file, folder, nodes)
    faults = find_faults(reports, nodes, 0 if recipe.device == "cpu" else allocation.gpus)
    if not faults:
        slurm.log_line(links_line(reports, nodes))
        faults = check_all_reduce(recipe, allocation)
    took = time.monotonic() - started
    result = f"{len(faults)} faults" if faults else "all is well"
    slurm.log_line(f"preflight: {result} on {len(nodes)} nodes, {took:.0f} s")
    for fault in faults:
        slurm.log_line(f"preflight: {fault}")
    return faults


def probe_nodes(
    recipe: Recipe, recipe_file: Path, folder: Path, nodes: Sequence[str]
) -> list[Report]:
    """Run node_probe.py on every node; return the reports of those that answered."""
    meeting = folder / f"preflight-{secrets.token_hex(4)}"
    command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    command += [*srun_options(os.environ), *python_command(os.environ)]
    command += ["-m", "dtrain.launching.node_probe"]
    command += [f"--revision={recipe.model.revision}"] if recipe.model.revision else []
    command += [recipe.model.base, str(recipe_file), str(meeting), *nodes]
    try:
        text = output_of(command, NODES_SECONDS)
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    return [report for report in parse_json_lines(text) if "node" in report]


def output_of(
    command: Sequence[str], seconds: float, *, up: str = "", up_seconds: float = 0.0
) -> str:
    """What a command prints until it ends or the time is over; its stderr goes to the log.

    Args:
        command: to run.
        seconds: that it may take.
        up: beginning of the lines after each of which its time is counted from zero.
        up_seconds: the time from then on.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    lines: SimpleQueue[str] = SimpleQueue()  # an empty line is the end
    threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
    text, deadline = "", time.monotonic() + seconds
    try:
        while line := lines.get(timeout=max(0.0, deadline - time.monotonic())):
            text += line
            if up and line.startswith(up):
                deadline = time.monotonic() + up_seconds
    except Empty:
        process.terminate()
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    with suppress(Empty):  # where srun is a script, the real one may live on and hold the pipe
        while line := lines.get(timeout=END_SECONDS):
            text += line
    return text


def _pass_on(process: subprocess.Popen[str], lines: SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")
    lines.put("")  # for a reader that continues after the end


def links_line(reports: Sequence[Report], nodes: Sequence[str]) -> str:
    """The slowest link, for the log."""
    links = [link for report in reports for link in report["links"].values()]
    if not links:
        return f"preflight: {nodes[0]} alone, no links"
    slowest = min(link["megabytes_per_second"] for link in links)
    longest = max(link["milliseconds"] for link in links)
    return f"preflight: slowest of {len(links)} links {slowest:.0f} MB/s, {longest:.2f} ms"


def check_all_reduce(recipe: Recipe, allocation: slurm.Allocation) -> list[Fault]:
    """Check an all-reduce over all ranks: whether it is right, and how fast."""
    nodes, ranks = allocation.nodes, ranks_per_node(recipe, allocation.gpus)
    if len(nodes) == 1 and ranks == 1:
        return []
    command = step_command(
        [recipe.device],
        nodes=len(nodes),
        ranks=ranks,
        endpoint=rendezvous_endpoint(os.environ, nodes[0]),
        cores=allocation.cores,
        worker="dtrain.distributed.all_reduce_check",
    )
    text = output_of(command, START_SECONDS, up='{"up"', up_seconds=RANKS_SECONDS)
    results = parse_json_lines(text)
    speeds = next((r[_SPEEDS] for r in results if _SPEEDS in r), None)
    if speeds is None:
        return [Fault("", _silence(results, nodes))]
    for where, speed in speeds.items():
        slurm.log_line(f"preflight: all-reduce {where}: {speed:.2f} GB/s")
    wrong = sorted({result["wrong"] for result in results if "wrong" in result})
    return [Fault(node, "all-reduce returned a wrong result on this node") for node in wrong]


def _silence(results: Sequence[Mapping[str, Any]], nodes: Sequence[str]) -> str:
    """How far the ranks got that did not finish the all-reduce."""
    silent = sorted(set(nodes) - {str(result.get("up")) for result in results})
    if silent:
        return f"no rank has started on {', '.join(silent)} (in at most {START_SECONDS} s)"
    return f"the ranks did not finish an all-reduce (in at most {RANKS_SECONDS} s)"


def handle_faults(
    faults: Sequence[Fault],
    run: RunDir,
    command: Sequence[str],
    environ: Mapping[str, str],
) -> None:
    """Record a failed preflight; with DTRAIN_PREFLIGHT=exclude, submit the job again.

    A running job cannot change the nodes that it excludes, and nothing would change them for a
    requeued one, so a new job replaces it.

    Args:
        faults: what is wrong.
        run: the run folder.
        command: the job's script and its arguments.
        environ: variables of the job.
    """
    attempts = read_attempts(run)
    attempt = attempts[-1]
    reason = "; ".join(str(fault) for fault in faults)
    nodes = sorted({fault.node for fault in faults if fault.node})
    if environ.get("DTRAIN_PREFLIGHT") == "exclude" and nodes:
        job = submit_without(nodes, run, command, attempt, environ)
        reason += f"; job {job} takes its place"
        slurm.log_line(f"preflight: job {job} takes its place, without the nodes named")
    attempt.ended, attempt.outcome, attempt.action = time.time(), "preflight", "stop"
    attempt.reason = reason
    write_attempts(run, attempts)


def submit_without(
    nodes: Sequence[str],
    run: RunDir,
    command: Sequence[str],
    attempt: Attempt,
    environ: Mapping[str, str],
) -> str:
    """Submit the job of an attempt again without some nodes; return the new job's id."""
    job = slurm.ask(["scontrol", "show", "job", attempt.job])
    already = re.search(r"ExcNodeList=(\S+)", job)
    excluded = [*([already[1]] if already and already[1] != "(null)" else []), *nodes]
    limit = re.search(r"TimeLimit=(\S+)", job)
    script, *words = command
    copy = run.job_script("again")
    write_atomic(copy, Path(script).read_bytes())  # Slurm's own copy goes with the job
    sbatch = ["sbatch", "--parsable", f"--exclude={','.join(excluded)}"]
    sbatch += [f"--{name}={environ[known]}" for name, known in _SAME.items() if environ.get(known)]
    sbatch += [f"--time={limit[1]}"] if limit else []
    sbatch += [f"--chdir={Path.cwd()}", f"--dependency=afterany:{attempt.job}"]
    sbatch += [f"--output={attempt.log.replace('%', '%%')}"] if attempt.log else []
    return slurm.ask([*sbatch, str(copy), *words]).strip().split(";")[0]
