"""The list of attempts, and what the supervisor does with it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from dtrain import supervisor as module
from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.core.run_dir import RunDir
from dtrain.launching import slurm
from dtrain.launching.attempts import failures_in_a_row, read_attempts
from dtrain.supervisor import Supervisor

ENVIRON = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_CPUS_PER_TASK": "8"}


@pytest.fixture
def slurm_of_two(monkeypatch):
    """A Slurm with two nodes that knows of no job."""
    monkeypatch.setattr(slurm, "ask", lambda command, **_: "n0\nn1\n")
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)


def start(run, *overrides, **environ):
    keys = ["device=cpu", "launch.processes=1", f"output.folder={json.dumps(str(run))}"]
    environ = {**ENVIRON, **environ}
    recipe = load_recipe("tiny", [*keys, *overrides])
    supervisor, allocation = Supervisor(environ), slurm.current_allocation(environ)
    return supervisor.command(recipe, supervisor.begin(recipe, allocation), allocation)


def test_begin_clears_files_of_the_last_attempt(slurm_of_two, tmp_path):
    run = tmp_path / "run"
    start(run)
    (run / "stop").touch()
    (run / "outcome.json").write_text("{}")
    start(run, SLURM_RESTART_COUNT="1")
    assert not (run / "stop").exists() and not (run / "outcome.json").exists()
    first, second = read_attempts(RunDir(run))
    assert first.outcome == "lost"  # it never reached its end
    assert (second.number, second.restart, second.nodes) == (2, 1, ["n0", "n1"])


def test_each_attempt_has_its_own_rendezvous(slurm_of_two, tmp_path):
    commands = [start(tmp_path / name) for name in ("a", "b")]
    assert len({w for c in commands for w in c if w.startswith("--rdzv-endpoint=")}) == 2
    assert "--nnodes=2" in commands[0] and "--kill-on-bad-exit=1" in commands[0]


def test_port_is_chosen_after_the_preflight(slurm_of_two, tmp_path, monkeypatch):
    """Another program may take a port in the minutes that a preflight lasts."""
    log = []
    monkeypatch.setattr(module, "check_allocation", lambda *_: log.append("preflight"))
    monkeypatch.setattr(module, "rendezvous_endpoint", lambda *_: log.append("port"))
    monkeypatch.setattr(module, "step_command", lambda *_, **__: ["true"])
    monkeypatch.setattr(slurm, "job_state", lambda job: slurm.JobState("COMPLETING"))
    recipe = load_recipe("tiny", ["device=cpu", f"output.folder={tmp_path / 'run'}"])
    before = signal.getsignal(signal.SIGTERM)
    assert Supervisor(ENVIRON).run(recipe, Path("job.sh")) == 0
    signal.signal(signal.SIGTERM, before)
    assert log == ["preflight", "port"]


def test_single_node_needs_no_port(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "ask", lambda command, **_: "n0\n")
    assert not any(word.startswith("--rdzv") for word in start(tmp_path / "run"))


def test_attempts_lost_with_a_node_are_limited(slurm_of_two, tmp_path):
    for _ in range(3):
        start(tmp_path)
    with pytest.raises(UserError, match="3 tries in a row"):
        start(tmp_path)
    start(tmp_path, SLURM_JOB_ID="13")  # submitted again by hand


def test_new_checkpoint_resets_the_failure_count(slurm_of_two, tmp_path):
    start(tmp_path)
    for step in (5, 1_000_000, 999_999):
        folder = tmp_path / f"domain/checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "domain/stage.json").write_text('{"complete": false}')
    assert RunDir(tmp_path).progress() == {"domain": "step-1000000"}
    start(tmp_path)
    assert failures_in_a_row(read_attempts(RunDir(tmp_path)), "12", {}) == 0


def test_indivisible_batch_is_refused_before_the_ranks_start(slurm_of_two, tmp_path):
    with pytest.raises(UserError, match="cannot be divided by 2 ranks"):
        start(tmp_path, "stages.domain.train.global_batch_size=9")


def test_hostile_path_is_a_single_argument(slurm_of_two, tmp_path):
    run = tmp_path / "a'b\n#SBATCH"
    assert start(run)[-1] == f"{run}/recipe.yaml"


def test_job_is_requeued_only_while_it_runs(slurm_of_two, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "requeue", asked.append)
    monkeypatch.setattr(module, "REQUEUE_SECONDS", 0)
    for state, count in (("CANCELLED", 0), ("RUNNING", 1)):
        start(tmp_path)
        monkeypatch.setattr(slurm, "job_state", lambda job, s=state: slurm.JobState(s))
        supervisor = Supervisor(ENVIRON)
        supervisor.is_warned = True
        assert supervisor.end(RunDir(tmp_path), 75) == 75
        assert len(asked) == count
