"""Jobs in a container: the supervisor, the preflight and the ranks all start in the image."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.launching import submit
from dtrain.launching.container import IMAGE, MOUNTS, RUNTIME, python_command, recipe_mounts
from dtrain.launching.container import srun_options as options_of

ROOT = Path(__file__).parents[3]
HOSTILE = "my 'image'; touch x"
COMMANDS = {
    "scontrol": '[[ "$2" == hostnames ]] && echo n0; [[ "$2" != config ]] || echo "PluginDir = /"',
    "sbatch": "exit 1",
    "python3": f'exec {shlex.quote(sys.executable)} "$@"',
    # Runs what follows the image, as apptainer does.
    "apptainer": """\
{ printf 'apptainer'; printf ' %q' "$@"; echo; } >>"$FAKE/log"
while [[ "$1" != "$DTRAIN_CONTAINER" ]]; do shift; done; shift; exec "$@"
""",
    # The supervisor's own step runs; the steps that it starts are recorded.
    "srun": """\
[[ "$1" != --help ]] || { [[ ! -e "$FAKE/pyxis" ]] || echo " --container-image=x"; exit; }
{ printf 'srun'; printf ' %q' "$@"; echo; } >>"$FAKE/log"
[[ "$1" == --overlap ]] || exit 75
while [[ "$1" == --* ]]; do shift; done; exec "$@"
""",
}


class Job:
    """A job script of slurm/ among fake commands; `calls` are the arguments of each."""

    def __init__(self, folder: Path, image: str, preflight: str, *, pyxis: bool) -> None:
        self.folder, fake = folder, folder / "fake"
        fake.mkdir()
        for name, text in COMMANDS.items():
            (fake / name).write_text(f"#!/bin/bash\n{text}\n")
            (fake / name).chmod(0o755)
        if pyxis:
            (fake / "pyxis").touch()
        script = folder / "job.sh"
        script.write_text(f"DTRAIN_RECIPE=tiny\nsource {ROOT}/slurm/job.sh\n")
        self.mounts = f"{ROOT}:/code"
        environ = {
            "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURMD_NODENAME": "n0",
            "DTRAIN_PREFLIGHT": preflight, "DTRAIN_CACHE": str(folder / "cache"),
            "FAKE": str(fake), "PATH": f"{fake}:{os.environ['PATH']}", "HOME": str(folder),
            IMAGE: image, MOUNTS: self.mounts,
        }  # fmt: skip
        keys = ["device=cpu", "launch.processes=1", f"output.folder={folder}/run"]
        self.done = subprocess.run(
            ["bash", str(script), *keys],
            env=os.environ | environ, cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        log = fake / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        self.calls = [_words(line) for line in lines]


def _words(line: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("preflight", ["on", "off"])
def test_all_processes_of_a_job_start_through_apptainer(preflight: str, tmp_path: Path) -> None:
    job = Job(tmp_path, HOSTILE, preflight, pyxis=False)
    supervisor, step = job.calls
    assert supervisor[:4] == ["apptainer", "exec", "--nv", "--bind"]
    assert supervisor[5:8] == ["--pwd", str(tmp_path), HOSTILE]
    assert supervisor[8:12] == ["env", "--block-signal=USR1", "python3", "-m"]
    mounts = supervisor[4].split(",")
    own = f"{tmp_path}:{tmp_path}"
    assert mounts[:3] == [job.mounts, own, f"{tmp_path}/cache:{tmp_path}/cache"]
    slurm = [tmp_path / "fake" / name for name in ("srun", "scontrol", "sbatch")]
    assert {f"{path}:{path}" for path in slurm} <= set(mounts)
    inside = step[step.index("env") :]
    assert inside[3:6] == [str(tmp_path / "fake/apptainer"), "exec", "--nv"]
    image = inside.index(HOSTILE)
    shared = inside[inside.index("--bind") + 1].split(",")
    assert own in shared and str(tmp_path / "fake/srun") not in "".join(shared)
    module = "dtrain.launching.node_probe" if preflight == "on" else "dtrain.torchrun"
    assert inside[image + 1 : image + 4] == [sys.executable, "-m", module]
    assert not (tmp_path / "x").exists()


def test_pyxis_takes_other_images_than_apptainers_own(tmp_path: Path) -> None:
    job = Job(tmp_path, "docker://x/y z:1", "off", pyxis=True)
    supervisor, step = job.calls
    assert supervisor[1:6] == [
        "--overlap", "--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "--nodelist=n0"
    ]  # fmt: skip
    for call in (supervisor, step):
        assert "--container-image=docker://x/y z:1" in call
        assert f"--container-workdir={tmp_path}" in call
    assert step[step.index("-m") + 1] == "dtrain.torchrun" and "apptainer" not in step
    (tmp_path / "again").mkdir()
    own = Job(tmp_path / "again", "/images/dtrain.sif", "off", pyxis=True)
    assert [call[0] for call in own.calls] == ["apptainer", "srun"]


def test_paths_that_cannot_be_mounted_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    job = Job(folder, "x.sif", "off", pyxis=False)
    assert job.done.returncode == 2 and "cannot be mounted" in job.done.stderr and not job.calls


def test_container_outside_of_the_scripts_is_refused() -> None:
    assert options_of({}) == [] and python_command({}) == [sys.executable]
    with pytest.raises(UserError, match="only scripts of slurm/"):
        options_of({IMAGE: "x.sif"})
    assert options_of({IMAGE: "x.sif", RUNTIME: "/usr/bin/apptainer"}) == []


def test_submitted_script_mounts_what_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(IMAGE, "it's.sif")
    monkeypatch.setenv(MOUNTS, "/scratch:/scratch")
    for name in ("base", "data", "run"):
        (tmp_path / name).mkdir()
    sources = json.dumps([{"path": f"{tmp_path}/data/*.jsonl", "format": "text"}])
    keys = [f"model.base={tmp_path}/base", f"stages.domain.data.sources={sources}"]
    recipe = load_recipe("tiny", [*keys, f"output.folder={tmp_path}/run"])
    folders = [tmp_path / name for name in ("run", "base", "data")]
    assert recipe_mounts(recipe)[:3] == folders
    resources = submit.Resources()
    for job in (
        submit.training(recipe, resources, tmp_path),
        submit.preparation(recipe, resources, tmp_path),
    ):
        lines = job.script.splitlines()
        (image,) = [shlex.split(line) for line in lines if line.startswith("DTRAIN_CONTAINER=")]
        assert image == ["DTRAIN_CONTAINER=it's.sif"]
        mounts = next(line for line in lines if line.startswith("DTRAIN_CONTAINER_MOUNTS="))
        assert all(f"{folder}:{folder}" in mounts for folder in folders) and "/scratch" in mounts
        assert "DTRAIN_ENV" not in job.script and sys.prefix + "/bin" not in job.script


def test_images_have_the_files_that_the_package_is_built_from() -> None:
    folder = ROOT / "launch" / "container"
    docker, apptainer = ((folder / n).read_text() for n in ("Dockerfile", "dtrain.def"))
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    needed = {Path(name).parts[0] for name in included} | {"pyproject.toml", "dtrain"}
    copied = {
        word for line in re.findall(r"^COPY (.*) /src", docker, re.M) for word in line.split()
    }
    listed = set(re.findall(r"^    (\S+) /src/", apptainer, re.M))
    assert needed <= copied == listed and all((ROOT / name).exists() for name in copied)
    packages = [
        re.search(r"--no-install-recommends \\\n +(.*?)(?: \\)?\n", text)
        for text in (docker, apptainer)
    ]
    assert packages[0] and packages[1] and packages[0][1] == packages[1][1]
    images = set(re.findall(r"nvidia/cuda:\S+", docker + apptainer))
    assert len(images) == 1
