"""A handle on the throw-away cluster: run commands in it, watch jobs, plant faults on a node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
PRIVATE = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "--uts", "--ipc"]
T = TypeVar("T")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


def reason_to_skip() -> str | None:
    """Why no cluster can be started on this machine; None if one can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge iproute2"
        return f"no {', '.join(missing)} here: apt-get install {packages}"
    if os.geteuid() != 0:
        return "a Slurm cluster of our own needs root"
    trial = "ip link add v0 type veth peer name v1 && mount -t tmpfs tmpfs /run"
    tried = subprocess.run(
        ["unshare", *PRIVATE, "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return f"no private namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """`nodes` nodes with eight pretended GPUs each, named n0, n1, …"""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        command = ["unshare", *PRIVATE, sys.executable, str(HERE / "cluster_inside.py")]
        self._process = subprocess.Popen(
            [*command, str(folder), str(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the cluster did not start; see {folder}/log")
        self._nodes = json.loads(line)  # processes as they are numbered inside
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self._inner = children.read_text().split()[0]

    def close(self) -> None:
        """End the cluster and everything in it."""
        self._process.kill()
        self._process.wait()

    def run(
        self, *command: object, check: bool = True, timeout: float = 120, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head node, in the checkout."""
        environ = {**os.environ, **self.environment, **more}
        environ["SLURM_CONF"] = str(self.folder / "etc/slurm.conf")
        enter = ["nsenter", "-t", self._inner, "-a", f"--wd={ROOT}"]
        done = subprocess.run(
            [*enter, *map(str, command)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def on_node(self, number: int, *command: object, check: bool = True) -> str:
        """Run a command inside a node's own mounts and network."""
        inside = ["nsenter", "-t", self._nodes[number], "-m", "-n", "-u"]
        return self.run(*inside, *command, check=check).stdout

    def processes(self, number: int, module: str) -> list[str]:
        """Processes of a node (as numbered inside) that run `python -m MODULE`, oldest first."""
        pids = self.run("pgrep", "-f", f"^[^ ]*python[^ ]* (-u )?-m {module} ").stdout.split()
        name = f"n{number}"
        return [p for p in pids if self._host_of(p) == name]

    def _host_of(self, process: str) -> str:
        done = self.run("nsenter", "-t", process, "-u", "hostname", check=False)
        return done.stdout.strip()

    def sbatch(self, *arguments: object, **more: str) -> str:
        """Submit; return the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **more).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job; of an array's the first."""
        text = self.run("scontrol", "show", "job", "-o", job).stdout.splitlines()[0]
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, job: str, seconds: float = 120) -> dict[str, str]:
        """Wait for a job's end."""
        return self.until(job, lambda facts: facts["JobState"] in OVER, seconds)

    def until(
        self, job: str, is_true: Callable[[dict[str, str]], bool], seconds: float = 60
    ) -> dict[str, str]:
        """Wait until something is true of a job."""
        return wait_for(
            lambda: facts if is_true(facts := self.job(job)) else None,
            seconds,
            lambda: f"job {job}: {self.job(job)}\n{self.log_of(job)}",
        )

    def log_of(self, job: str) -> str:
        """The end of a job's log."""
        path = Path(self.job(job).get("StdOut", ""))
        return path.read_text(errors="replace")[-8000:] if path.is_file() else "(no log)"


def wait_for(look: Callable[[], T | None], seconds: float, story: Callable[[], str]) -> T:
    """Poll until there is a result; after that many seconds fail with the logs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = look()
        if result is not None:
            return result
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s; {story()}")
