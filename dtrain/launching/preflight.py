"""Every node looked at before the first step, from a job's script: `… preflight job RUN SCRIPT …`.

First without torch, in seconds: srun starts node_probe.py on each node, node_checks.py compares the
reports. Then all ranks do an all-reduce (distributed/all_reduce_check.py). A fault ends the job;
with DTRAIN_PREFLIGHT=exclude another one takes its place, without the nodes that are to blame.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic
from dtrain.core.run_dir import RunDir
from dtrain.launching import slurm
from dtrain.launching.attempt import node_names, ranks_of_a_node, say
from dtrain.launching.attempts import attempts_of, write_attempts
from dtrain.launching.commands import step_command
from dtrain.launching.network import rendezvous_endpoint
from dtrain.launching.node_checks import Fault, Report, judge

NODES_SECONDS = 90
START_SECONDS = 600  # until a rank is up: torch from a cold network file system takes minutes
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


def main(argv: list[str] | None = None) -> int:
    """Look at the job's nodes; return 0 if all is well."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] != ["job"] or len(arguments) < 3:
        print("usage: preflight job RUN SCRIPT [ARGUMENT …]", file=sys.stderr)
        return Exit.USER_ERROR
    run, script, words = Path(arguments[1]), Path(arguments[2]), arguments[3:]
    try:
        faults = preflight(RunDir(run).recipe, RunDir(run).slurm, os.environ)
        if not faults:
            return Exit.FINISHED
        successor = ""
        named = sorted({fault.node for fault in faults if fault.node})
        if os.environ.get("DTRAIN_PREFLIGHT") == "exclude" and named:
            successor = submit_without(named, script, words, run, os.environ)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    record(run, faults, successor)
    return Exit.CRASHED


def preflight(recipe_file: Path, folder: Path, environ: Mapping[str, str]) -> list[Fault]:
    """Look at every node of this job, then at all ranks together; say what was found.

    Args:
        recipe_file: the resolved recipe.
        folder: one that all nodes should see.
    """
    recipe, nodes = load_recipe(str(recipe_file)), node_names(environ)
    started = time.monotonic()
    reports = look_at_nodes(recipe_file, folder, nodes)
    given = environ.get("SLURM_GPUS_ON_NODE", "")
    gpus = int(given) if given.isdecimal() and recipe.device != "cpu" else 0
    faults = judge(reports, nodes, gpus)
    if not faults:
        say(tell_links(reports, nodes))
        faults = add_up(recipe, recipe_file, nodes, environ)
    took = time.monotonic() - started
    verdict = f"{len(faults)} faults" if faults else "all is well"
    say(f"preflight: {verdict} on {len(nodes)} nodes, {took:.0f} s")
    for fault in faults:
        say(f"preflight: {fault}")
    return faults


def look_at_nodes(recipe_file: Path, folder: Path, nodes: Sequence[str]) -> list[Report]:
    """What each node says of itself and its links; a node that says nothing is left out."""
    meeting = folder / f"preflight-{secrets.token_hex(4)}"
    command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    command += [sys.executable, "-m", "dtrain.launching.node_probe"]
    command += [str(recipe_file), str(meeting), *nodes]
    try:
        text = output_of(command, NODES_SECONDS)
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    return [r for line in text.splitlines() if (r := _report(line)) is not None]


def _report(line: str) -> Report | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "node" in value else None


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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
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
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
    while line := lines.get():
        text += line
    return text


def _pass_on(process: subprocess.Popen[str], lines: SimpleQueue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")
    lines.put("")  # for a reader that continues after the end


def tell_links(reports: Sequence[Report], nodes: Sequence[str]) -> str:
    """The worst link, for the log."""
    links = [link for report in reports for link in report["links"].values()]
    if not links:
        return f"preflight: {nodes[0]} alone, no links"
    slowest = min(link["megabytes_per_second"] for link in links)
    longest = max(link["milliseconds"] for link in links)
    return f"preflight: slowest of {len(links)} links {slowest:.0f} MB/s, {longest:.2f} ms"


def add_up(
    recipe: Recipe, recipe_file: Path, nodes: Sequence[str], environ: Mapping[str, str]
) -> list[Fault]:
    """All-reduce over all ranks: is it right, and how fast."""
    ranks = ranks_of_a_node(recipe, environ)
    if len(nodes) == 1 and ranks == 1:
        return []
    command = step_command(
        recipe_file,
        nodes=len(nodes),
        ranks=ranks,
        endpoint=rendezvous_endpoint(environ, nodes[0]),
        rendezvous=secrets.token_hex(8),
        cores=environ.get("SLURM_CPUS_PER_TASK"),
        worker="dtrain.distributed.all_reduce_check",
    )
    text = output_of(command, START_SECONDS, up='{"up"', up_seconds=RANKS_SECONDS)
    results: list[dict[str, Any]] = [json.loads(s) for s in text.splitlines() if s[:2] == '{"']
    speeds = next((r[_SPEEDS] for r in results if _SPEEDS in r), None)
    if speeds is None:
        return [Fault("", _no_sum(results, nodes))]
    for where, speed in speeds.items():
        say(f"preflight: all-reduce {where}: {speed:.2f} GB/s")
    wrong = sorted({result["wrong"] for result in results if "wrong" in result})
    return [Fault(node, "its ranks add up wrongly") for node in wrong]


def _no_sum(results: Sequence[Mapping[str, Any]], nodes: Sequence[str]) -> str:
    """How far the ranks came that did not add up."""
    silent = sorted(set(nodes) - {str(result.get("up")) for result in results})
    if silent:
        return f"no rank has started on {', '.join(silent)} (in at most {START_SECONDS} s)"
    return f"the ranks came to no sum (in at most {RANKS_SECONDS} s)"


def submit_without(
    named: Sequence[str],
    script: Path,
    words: Sequence[str],
    run: Path,
    environ: Mapping[str, str],
) -> str:
    """Submit the same job again without some nodes; return its number.

    A job that runs cannot change the nodes that it excludes, and one that waits again has nobody
    left to change them; so another one takes its place.
    """
    job = environ["SLURM_JOB_ID"]
    facts = slurm.ask(["scontrol", "show", "job", job])
    already = re.search(r"ExcNodeList=(\S+)", facts)
    excluded = [*([already[1]] if already and already[1] != "(null)" else []), *named]
    limit = re.search(r"TimeLimit=(\S+)", facts)
    copy = RunDir(run).job_script("again")
    write_atomic(copy, script.read_bytes())  # Slurm's own copy goes with the job
    command = ["sbatch", "--parsable", f"--exclude={','.join(excluded)}"]
    command += [f"--{name}={environ[known]}" for name, known in _SAME.items() if environ.get(known)]
    command += [f"--time={limit[1]}"] if limit else []
    command += [f"--chdir={Path.cwd()}", f"--dependency=afterany:{job}"]
    log = attempts_of(run)[-1].log
    command += [f"--output={log.replace('%', '%%')}"] if log else []
    return slurm.ask([*command, str(copy), *words]).strip().split(";")[0]


def record(run: Path, faults: Sequence[Fault], successor: str) -> None:
    """Write down how the attempt ended."""
    attempts = attempts_of(run)
    last = attempts[-1]
    last.ended, last.outcome, last.action = time.time(), "preflight", "stop"
    last.because = "; ".join(str(fault) for fault in faults)
    if successor:
        last.because += f"; job {successor} takes its place"
        say(f"preflight: job {successor} takes its place, without the nodes named")
    write_attempts(run, attempts)


if __name__ == "__main__":
    sys.exit(main())
