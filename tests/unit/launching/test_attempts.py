"""The list of attempts, and what a new one makes of it."""

from __future__ import annotations

import json

import pytest

from dtrain.core.errors import UserError
from dtrain.core.run_dir import RunDir
from dtrain.launching import attempt as module
from dtrain.launching import slurm
from dtrain.launching.attempt import begin, main
from dtrain.launching.attempts import attempts_of, failures_in_a_row

ENVIRON = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_CPUS_PER_TASK": "8"}


@pytest.fixture
def slurm_of_two(monkeypatch):
    """A Slurm with two nodes that knows of no job."""
    monkeypatch.setattr(slurm, "ask", lambda command, **_: "n0\nn1\n")
    for name, value in ENVIRON.items():
        monkeypatch.setenv(name, value)


def start(run, *overrides, **environ):
    keys = ["device=cpu", "launch.processes=1", f"output.folder={json.dumps(str(run))}"]
    return begin("tiny", [*keys, *overrides], {**ENVIRON, **environ})


def test_leftovers_of_the_last_attempt_are_cleared(slurm_of_two, tmp_path):
    run = tmp_path / "run"
    start(run)
    (run / "stop").touch()
    (run / "outcome.json").write_text("{}")
    start(run, SLURM_RESTART_COUNT="1")
    assert not (run / "stop").exists() and not (run / "outcome.json").exists()
    first, second = attempts_of(run)
    assert first.outcome == "lost"  # it never came to its end
    assert (second.number, second.restart, second.nodes) == (2, 1, ["n0", "n1"])


def test_rendezvous_is_another_one_each_time(slurm_of_two, tmp_path):
    commands = [start(tmp_path / name)[1] for name in ("a", "b")]
    rendezvous = [{w for w in c if w.startswith("--rdzv-")} for c in commands]
    assert len(rendezvous[0] & rendezvous[1]) == 1  # the backend
    assert "--nnodes=2" in commands[0] and "--kill-on-bad-exit=1" in commands[0]


def test_single_node_stays_on_the_loopback(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "ask", lambda command, **_: "n0\n")
    _, command = start(tmp_path / "run")
    assert "--rdzv-endpoint=127.0.0.1:0" in command and "--local-addr=127.0.0.1" in command


def test_job_that_its_node_takes_every_time_is_bounded(slurm_of_two, tmp_path):
    for _ in range(3):
        start(tmp_path)
    with pytest.raises(UserError, match="3 tries in a row"):
        start(tmp_path)
    start(tmp_path, SLURM_JOB_ID="13")  # submitted anew by hand


def test_new_checkpoint_counts(slurm_of_two, tmp_path):
    start(tmp_path)
    for step in (5, 1_000_000, 999_999):
        folder = tmp_path / f"domain/checkpoints/step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (tmp_path / "domain/stage.json").write_text('{"complete": false}')
    assert RunDir(tmp_path).progress() == {"domain": "step-1000000"}
    start(tmp_path)
    assert failures_in_a_row(attempts_of(tmp_path), "12", {}) == 0


def test_batch_that_ranks_cannot_share_is_told_before_they_start(slurm_of_two, tmp_path):
    with pytest.raises(UserError, match="cannot be divided by 2 ranks"):
        start(tmp_path, "stages.domain.train.global_batch_size=9")


def test_words_are_ended_by_nul(slurm_of_two, tmp_path, capfdbinary):
    run = tmp_path / "a'b\n#SBATCH"
    keys = ["device=cpu", "launch.processes=1", f"output.folder={json.dumps(str(run))}"]
    assert main(["begin", "tiny", *keys]) == 0
    words = capfdbinary.readouterr().out.decode().split("\0")
    assert words[0] == str(run) and words[-2] == f"{run}/recipe.yaml" and words[-1] == ""


def test_mistake_is_a_user_error(slurm_of_two, capfd):
    assert main(["begin", "tiny", "engine.kin=ddp"]) == 2
    assert "did you mean kind" in capfd.readouterr().err


def test_requeue_is_asked_for_only_while_the_job_runs(slurm_of_two, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(slurm, "requeue", asked.append)
    monkeypatch.setattr(module, "REQUEUE_SECONDS", 0)
    for state, count in (("CANCELLED", 0), ("RUNNING", 1)):
        start(tmp_path)
        monkeypatch.setattr(slurm, "job_state", lambda job, s=state: slurm.JobState(s))
        main(["end", str(tmp_path), "75", "--warned"])
        assert len(asked) == count
