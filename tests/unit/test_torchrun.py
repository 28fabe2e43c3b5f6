"""Exit statuses and signals between `dtrain run` and its workers."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name

import psutil
import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.numa.binding import NumaOptions

from dtrain.core import hardware
from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import Exit
from dtrain.launching.commands import launcher_environment, torchrun_command, worker_environment
from dtrain.torchrun import SECONDS_FOR_THE_OTHERS, Signals, main, status_of

WORKER = """
import os, signal, sys, time
rank, what = int(os.environ["RANK"]), sys.argv[1]
if what == "user error" and rank == 1:
    print("error: the worker's own words", file=sys.stderr)
    sys.exit(2)
if what == "killed" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what == "memory" and rank == 1:
    bytearray(b"x" * (1 << 20)) * (4 << 10)
asked = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda *_: asked.append(1))
os.write(1, b"ready\\n")  # in one piece: two ranks share the pipe
while not asked:
    time.sleep(0.01)
sys.exit(75)
"""


def start(tmp_path: Path, scenario: str, group: Path | None = None) -> subprocess.Popen[str]:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = torchrun_command(Path("unused"), 2)
    command = [*command[: command.index("dtrain.train") - 1], str(worker), scenario]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if group is not None:
        command = ["sh", "-c", f'echo $$ >{group}/cgroup.procs; exec "$@"', "sh", *command]
    return subprocess.Popen(command, **streams)


def failures(*codes: int) -> dict[int, ProcessFailure]:
    return {
        rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
        for rank, code in enumerate(codes)
        if code
    }


@pytest.mark.parametrize(
    ("codes", "seen", "status"),
    [
        ((0, 2), (), Exit.USER_ERROR),
        ((1, 2), (), Exit.USER_ERROR),  # the others lost their connection
        ((-15, 3), (), Exit.NON_FINITE),
        ((75, -15), (), Exit.INTERRUPTED),
        ((0, 75), (), Exit.INTERRUPTED),
        ((1, 75), (), Exit.CRASHED),  # the second was ended because the first had crashed
        ((75, -9), (), Exit.CRASHED),
        ((75, -9), (9, 2), Exit.INTERRUPTED),  # Ctrl-C twice
        ((-15, -15), (15,), Exit.INTERRUPTED),  # asked to stop before it listened
        ((130, -15), (2,), Exit.CTRL_C),
        ((130, 75), (2,), Exit.INTERRUPTED),
        ((-15, -9), (), Exit.CRASHED),
        ((1, -15), (), Exit.CRASHED),
        ((17, 0), (), Exit.CRASHED),
    ],
)
def test_exit_status_is_chosen_from_all_workers(
    codes: tuple[int, ...], seen: tuple[int, ...], status: int
) -> None:
    assert status_of(failures(*codes), set(seen)) == status


def test_only_the_workers_status_and_message_are_reported(tmp_path: Path) -> None:
    process = start(tmp_path, "user error")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.USER_ERROR
    assert errors.strip() == "error: the worker's own words"


def test_temporary_folder_is_empty_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    start(tmp_path, "user error").communicate(timeout=120)
    assert list(temporary.iterdir()) == []


def test_killed_worker_is_reported(tmp_path: Path) -> None:
    process = start(tmp_path, "killed")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.CRASHED
    assert "rank 1 was killed by SIGKILL" in errors and "Traceback" not in errors


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group of 1 GiB inside this one."""
    line = next((s for s in Path("/proc/self/cgroup").read_text().split() if ":memory:" in s), "")
    root = Path("/sys/fs/cgroup")
    control_group = root / "memory" / line.split(":")[2].lstrip("/") if line else root
    group = control_group / f"dtrain-test-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if line else "memory.max"
        (group / limit).write_text(str(1 << 30))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        pytest.skip("no control group with a limit of memory can be made here")
    yield group
    group.rmdir()


def test_worker_killed_by_the_kernel_oom_is_out_of_memory(
    tmp_path: Path, small_memory: Path
) -> None:
    process = start(tmp_path, "memory", group=small_memory)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.OUT_OF_MEMORY
    assert "rank 1 was killed by the kernel" in errors and "Traceback" not in errors
    # A rank that hung was killed too, and memory had run out elsewhere before.
    assert status_of(failures(-9, 5), set(), memory_ran_out=True) == Exit.HANG


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_reaches_the_workers(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "wait")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == Exit.INTERRUPTED
    assert errors == ""


def test_interrupt_before_any_worker_may_come_in_the_middle_of_a_print(monkeypatch, capfd) -> None:
    class Busy:
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(psutil.Process, "children", lambda self: [])
    monkeypatch.setattr(sys, "stderr", Busy())
    with pytest.raises(SystemExit) as ended:
        Signals()._pass_on(signal.SIGINT, None)
    assert ended.value.code == Exit.CTRL_C
    assert "interrupted before the training" in capfd.readouterr().err


def test_signal_reaches_the_workers_after_one_that_has_just_ended(monkeypatch) -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    workers = [psutil.Process(process.pid) for process in processes]
    monkeypatch.setattr(psutil.Process, "children", lambda self: workers)
    monkeypatch.setattr("dtrain.torchrun._leads_session", lambda process: True)
    processes[0].kill()
    processes[0].wait()
    Signals()._pass_on(signal.SIGTERM, None)
    assert processes[1].wait(60) == -signal.SIGTERM


def test_hostile_names_remain_one_argument() -> None:
    name = 'a\'; echo "$HOME" `id` && \n'
    assert torchrun_command(Path(name), 2, ["--x y"])[-3:] == [name, "--allow-change", "--x y"]


def test_worker_environment_sets_threads_and_caches_unless_they_are_set() -> None:
    environment = worker_environment({}, 10**6, has_gpu=False)
    assert environment["OMP_NUM_THREADS"] == "1" and environment["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in worker_environment({}, 1, has_gpu=True)
    assert "OMP_NUM_THREADS" not in worker_environment({"OMP_NUM_THREADS": "7"}, 1, has_gpu=True)
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    assert int(worker_environment({}, 1, has_gpu=True)["TORCHINDUCTOR_COMPILE_THREADS"]) <= 4
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):  # what is compiled is kept
        assert Path(environment[name]).parent == cache_folder()
        assert name not in worker_environment({name: "/elsewhere"}, 1, has_gpu=True)
    assert (
        launcher_environment({"A": "b"}, "cpu").items()
        >= {"A": "b", "DS_ACCELERATOR": "cpu"}.items()
    )


def test_threads_share_the_cores_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`docker --cpus=4` shows all 64 cores of the host; 64 threads would wait for each other."""
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    for ranks, threads in ((1, "4"), (2, "2"), (8, "1")):
        assert worker_environment({}, ranks, has_gpu=False)["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_the_default_on_gpus(name: str) -> None:
    environment = worker_environment({}, 1, has_gpu=True)
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in worker_environment({}, 1, has_gpu=False)
    chosen = {name: "max_split_size_mb:128"}
    assert "PYTORCH_ALLOC_CONF" not in worker_environment(chosen, 1, has_gpu=True)


def test_every_launcher_sets_the_worker_environment(tmp_path: Path) -> None:
    """`python -m dtrain.train` sets it itself, for launchers that are not dtrain's."""
    code = """
import os, sys
import dtrain.train as train
train.main = lambda: print(os.environ["TORCHINDUCTOR_COMPILE_THREADS"], "torch" in sys.modules) or 0
train.run()
"""
    environ = {**os.environ, "LOCAL_SIZE": "1000"}  # deepspeed's name of it
    environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 False\n"  # torch reads some of them when it is imported


def parsed(monkeypatch: pytest.MonkeyPatch, *options: str, lacks: Sequence[str] = ()) -> Namespace:
    """What torchrun would run with, in a version whose parser lacks some options."""
    ran: list[Namespace] = []
    whole = torchrun.parse_args

    def parse(words: list[str]) -> Namespace:
        arguments = whole(words)
        for name in lacks:
            delattr(arguments, name)
        return arguments

    monkeypatch.setattr(torchrun, "parse_args", parse)
    monkeypatch.setattr(torchrun, "run", ran.append)
    monkeypatch.setattr(Signals, "listen", lambda self: None)
    monkeypatch.setattr("dtrain.torchrun.restrict_stores", lambda: None)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main([*options, "-m", "dtrain.train", "x"]) == Exit.FINISHED
    return ran[0]


def test_options_missing_in_an_older_torchrun_are_omitted(monkeypatch) -> None:
    assert parsed(monkeypatch, "--nnodes=1").shutdown_timeout == SECONDS_FOR_THE_OTHERS
    environment = parsed(monkeypatch, "--nnodes=1", lacks=["shutdown_timeout", "numa_binding"])
    assert not {"shutdown_timeout", "numa_binding"} & set(vars(environment))


@pytest.mark.parametrize("is_newer", [False, True])  # torch 2.14 renamed an argument
def test_ranks_are_bound_to_cores_near_their_gpus_if_all_can_be(
    monkeypatch, is_newer: bool
) -> None:
    near: dict[int, set[int]] = {0: {0}, 1: {1}}

    def cores(gpu: int) -> set[int]:
        if not near[gpu]:
            raise RuntimeError("Must bind to a non-empty set of CPU indices")
        return near[gpu]

    def older(*, gpu_index: int, numa_options: NumaOptions) -> set[int]:
        return cores(gpu_index)

    def newer(*, device_index: int, numa_options: NumaOptions) -> set[int]:
        return cores(device_index)

    name = "torch.numa.binding._get_validated_logical_cpus_to_bind_to"
    installed = signature(resolve_name(name)).parameters
    assert list(installed) in [list(signature(version).parameters) for version in (older, newer)]
    monkeypatch.setattr(name, newer if is_newer else older)
    assert parsed(monkeypatch, "--nproc-per-node=2").numa_binding is None  # no GPU
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert parsed(monkeypatch, "--nproc-per-node=2").numa_binding == "node"
    assert parsed(monkeypatch, "--nproc-per-node=3").numa_binding is None
    chosen = parsed(monkeypatch, "--nproc-per-node=2", "--numa-binding=socket")
    assert chosen.numa_binding == "socket"
    near[1] = set()  # the job has no core on that GPU's node: torchrun itself would end there
    assert parsed(monkeypatch, "--nproc-per-node=2").numa_binding is None


def test_nodes_meet_without_pickles(monkeypatch, capsys) -> None:
    alone = parsed(monkeypatch, "--nnodes=1", "--standalone")
    assert alone.rdzv_backend == "single-node" and not alone.standalone
    monkeypatch.setenv("SLURM_NODEID", "1")
    several = ["--nnodes=2", "--rdzv-endpoint=10.9.8.7:1234"]
    assert parsed(monkeypatch, *several).node_rank == 1
    assert parsed(monkeypatch, *several, "--node-rank=3").node_rank == 3
    for options, where in (
        (["--rdzv-backend=c10d"], "--rdzv-backend: whoever reaches the port of c10d"),
        (["--rdzv-backend=etcd-v2"], "--rdzv-backend"),
        (["--nnodes=1:2"], "--nnodes"),
        (["--nnodes=2"], "--rdzv-endpoint"),
    ):
        assert main([*options, "-m", "dtrain.train", "x"]) == Exit.USER_ERROR
        assert where in capsys.readouterr().err


def test_workers_use_the_current_python() -> None:
    assert torchrun_command(Path("x"), "auto")[0] == sys.executable


def test_folder_of_a_killed_launcher_is_removed_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import sys; from argparse import Namespace; from dtrain.torchrun import private_folder\n"
        "with private_folder(Namespace(redirects='0', tee='0', log_dir=None)) as folder:\n"
        "    print(folder, flush=True); sys.stdin.read()"
    )
    command, temporary = [sys.executable, "-c", code], os.environ | {"TMPDIR": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": temporary}
    killed = subprocess.Popen(command, **pipes)
    left = Path(killed.stdout.readline().strip())
    killed.kill()
    killed.wait()
    unlocked = tmp_path / "torchelastic_new"  # its launcher is about to lock it
    unlocked.mkdir()
    (unlocked / ".lock").touch()
    living = subprocess.Popen(command, **pipes)
    current = Path(living.stdout.readline().strip())
    third = subprocess.run(command, **pipes | {"stdin": subprocess.DEVNULL}, check=False)
    assert third.returncode == 0
    assert sorted(tmp_path.iterdir()) == sorted([unlocked, current]) and left != current
    living.communicate("")
    assert list(tmp_path.iterdir()) == [unlocked]
