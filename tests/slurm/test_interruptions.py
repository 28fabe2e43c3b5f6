"""A job that is interrupted in any way ends with the weights of an undisturbed job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import OVER, Cluster, wait_for

TWO_NODES = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=8"]
KEYS = [
    "launch.processes=1",
    "evaluation.sets={}",
    "stages.domain.train.evaluate_every_steps=null",
    "stages.domain.train.evaluate_on=null",
    "stages.task.train.evaluate_every_steps=null",
    "stages.task.train.evaluate_on=null",
    "stages.domain.train.steps=900",
    "stages.domain.train.checkpoint_every_steps=20",
]
RESTART_SECONDS = 150


class DisturbedJob:
    """A job that is interrupted several times in its first stage."""

    def __init__(self, cluster: Cluster, job: str, run: Path) -> None:
        self.cluster, self.job, self.run = cluster, job, run
        self.events: list[str] = []

    def last_step_at(self) -> float:
        """When metrics.jsonl was last written."""
        path = self.run / "domain/metrics.jsonl"
        return path.stat().st_mtime if path.exists() else 0.0

    def attempts(self) -> list[dict]:
        """The run's own record."""
        path = self.run / "slurm/attempts.json"
        return json.loads(path.read_text()) if path.exists() else []

    def reach_limit(self) -> None:
        """Pause training until Slurm warns of the time limit; then remove the limit.

        A machine so busy that the warning comes before the first checkpoint does without.
        """
        stop, ranks = self.run / "stop", []
        self._wait(lambda: stop.exists() or self.checkpoints() or len(self.attempts()) > 1)
        if not stop.exists() and len(self.attempts()) == 1:
            ranks = [self.cluster.processes(n, "dtrain.train")[0] for n in self.nodes()]
            self.cluster.run("kill", "-STOP", *ranks)
            self._wait(stop.exists)
            self.cluster.run("kill", "-CONT", *ranks)
        self.cluster.until(self.job, lambda facts: facts.get("Restarts") == "1", RESTART_SECONDS)
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "TimeLimit=60")

    def nodes(self) -> list[int]:
        """Numbers of the nodes that the newest attempt has."""
        return [int(name[1:]) for name in self.attempts()[-1]["nodes"]]

    def checkpoints(self) -> set[str]:
        """Complete checkpoints."""
        return {p.parent.name for p in self.run.glob("domain/checkpoints/step-*/manifest.json")}

    def until_begun(self) -> None:
        """Wait for the first attempt."""
        self._wait(self.attempts)

    def until_training(self, attempt: int) -> None:
        """Wait until an attempt has made steps and a checkpoint of its own."""
        before = self.checkpoints()
        self._wait(lambda: len(self.attempts()) >= attempt)
        self._wait(lambda: self.checkpoints() - before)

    def interrupt(self, name: str, event: Callable[[], object], *outcomes: str) -> None:
        """Interrupt the job in mid stage; wait for the first step after it."""
        number = len(self.attempts())
        happened = time.monotonic()
        event()
        self._wait(lambda: len(self.attempts()) > number)
        new = self.attempts()[number]
        self._wait(lambda: self.last_step_at() > new["started"] + 2)
        took = time.monotonic() - happened
        old = self.attempts()[number - 1]
        self.events.append(f"{name}: {old['outcome']}, next step after {took:.0f} s")
        assert old["outcome"] in outcomes, (name, old)

    def _wait(self, is_true: Callable[[], object]) -> None:
        wait_for(lambda: is_true() or self._over(), RESTART_SECONDS, self.story)

    def _over(self) -> None:
        state = self.cluster.job(self.job)["JobState"]
        assert state not in OVER or state == "NODE_FAIL", self.story()

    def story(self) -> str:
        """The events so far, the attempts and the log."""
        return f"{self.events} {self.attempts()} {self.cluster.log_of(self.job)}"


def weights(run: Path) -> list[bytes]:
    """The last adapter and the merged model."""
    names = ("domain/adapter", "task/adapter", "task/merged")
    return [next((run / name).glob("*.safetensors")).read_bytes() for name in names]


@pytest.mark.timeout(900)
def test_interrupted_job_ends_with_the_weights_of_an_uninterrupted_one(cluster, submit, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = [*TWO_NODES, "--nodelist=n3,n4"]
    undisturbed = submit("70b-qlora", options, [*KEYS, f"output.folder={whole}"])
    # Slurm checks time limits every half minute: the warning comes 10 to 40 s after the start.
    options = [*TWO_NODES, "--exclude=n3,n4", "--time=1", "--signal=B:USR1@20"]
    job = submit("70b-qlora", options, [*KEYS, f"output.folder={run}"])
    disturbed = DisturbedJob(cluster, job, run)
    disturbed.until_begun()

    disturbed.interrupt("time limit", disturbed.reach_limit, "warned")
    disturbed.until_training(2)
    warn = ["scancel", "--batch", "--signal=USR1", job]
    disturbed.interrupt("warned", lambda: cluster.run(*warn), "warned")
    high = ["--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    nodes = "--nodelist=" + ",".join(f"n{number}" for number in disturbed.nodes())
    disturbed.interrupt("preempted", lambda: cluster.sbatch(*high, nodes), "preempted")
    disturbed.until_training(4)
    worker = cluster.processes(disturbed.nodes()[1], "dtrain.train")[0]
    lost = ("lost a worker", "crashed")
    disturbed.interrupt("worker killed", lambda: cluster.run("kill", "-KILL", worker), *lost)
    disturbed.until_training(5)
    agent = cluster.processes(disturbed.nodes()[1], "dtrain.torchrun")[0]
    disturbed.interrupt("agent killed", lambda: cluster.run("kill", "-KILL", agent), *lost)
    disturbed.until_training(6)
    node = f"NodeName=n{disturbed.nodes()[1]}"
    down = ["scontrol", "update", node, "State=DOWN", "Reason=test"]
    disturbed.interrupt("node down", lambda: cluster.run(*down), "lost", "completing", "node_fail")
    cluster.run("scontrol", "update", node, "State=RESUME")
    print("\n".join(disturbed.events))
    assert cluster.wait(undisturbed, 300)["JobState"] == "COMPLETED"
    assert cluster.wait(job, 300)["JobState"] == "COMPLETED"
    assert weights(run) == weights(whole)
