"""Faults planted on one node of two: each is found, and the node is named, within a minute."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from cluster import Cluster


@contextmanager
def mounted(cluster: Cluster, node: int, *options: object) -> Iterator[None]:
    """Something mounted on one node alone; the last word is where."""
    cluster.on_node(node, "mount", *options)
    try:
        yield
    finally:
        cluster.on_node(node, "umount", options[-1])


@contextmanager
def traffic(cluster: Cluster, node: int, *arguments: str) -> Iterator[None]:
    """A queueing discipline or a route on one node alone."""
    kind, device, *rest = arguments
    cluster.on_node(node, kind, device, "add", *rest)
    try:
        yield
    finally:
        cluster.on_node(node, kind, device, "del", *rest)


def look(cluster: Cluster, run: Path, *options: str) -> tuple[int, str]:
    """`dtrain preflight` inside an allocation of n0 and n1; its status and what it said."""
    command = ["salloc", "--quiet", "--nodelist=n0,n1", "--nodes=2", *options]
    command += [f"{cluster.environment['DTRAIN_ENV']}/bin/python", "-m", "dtrain", "preflight"]
    done = cluster.run(*command, "tiny", "device=cpu", f"output.folder={run}", check=False)
    return done.returncode, done.stdout + done.stderr


def other_version(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of peft's metadata with another version, and the path of the real one."""
    real = Path(str(importlib.metadata.distribution("peft").locate_file(""))) / (
        f"peft-{importlib.metadata.version('peft')}.dist-info/METADATA"
    )
    copy = tmp_path / "METADATA"
    lines = real.read_text().splitlines(keepends=True)
    text = "".join("Version: 0.1.2\n" if s.startswith("Version:") else s for s in lines)
    copy.write_text(text)
    return copy, real


def test_other_version_full_disk_and_slow_link_are_found(cluster, tmp_path):
    cache = cluster.environment["DTRAIN_CACHE"]
    Path(cache).mkdir(exist_ok=True)
    with ExitStack() as faults:
        copy, real = other_version(tmp_path)
        faults.enter_context(mounted(cluster, 1, "--bind", copy, real))
        small = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", cache]
        faults.enter_context(mounted(cluster, 1, *small))
        slow = ["dev", "e0", "root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "50ms"]
        faults.enter_context(traffic(cluster, 1, "tc", "qdisc", *slow))
        status, said = look(cluster, tmp_path / "run")
    assert status == 1
    assert "n1: peft is 0.1.2" in said
    assert f"n1: cache {cache}: No space left on device" in said
    assert "from n1 to n0: slow" in said


def test_unshared_folder_is_found(cluster, tmp_path):
    (tmp_path / "run").mkdir()
    with mounted(cluster, 1, "-t", "tmpfs", "tmpfs", tmp_path / "run"):
        status, said = look(cluster, tmp_path / "run")
    assert status == 1
    assert "n1: its files in the run folder are not seen by n0: not shared" in said


def test_unreachable_node_is_found(cluster, tmp_path):
    with traffic(cluster, 1, "ip", "route", "blackhole", "10.99.0.10/32"):
        status, said = look(cluster, tmp_path / "run")
    assert status == 1
    assert "from n1 to n0: cannot be reached" in said


@pytest.mark.timeout(200)
def test_job_continues_without_the_faulty_node(cluster, submit, tmp_path):
    run = tmp_path / "run"
    copy, real = other_version(tmp_path)
    keys = [f"output.folder={run}", "launch.processes=1", "stages.domain.train.steps=2"]
    options = ["--nodes=2", "--gpus-per-node=1", "--nodelist=n0,n1"]
    with mounted(cluster, 1, "--bind", copy, real):
        job = submit("70b-qlora", options, keys, DTRAIN_PREFLIGHT="exclude")
        cluster.wait(job)
        log = cluster.log_of(job)
        successor = str(int(job) + 1)
        assert f"job {successor} takes its place" in log
        facts = cluster.job(successor)
        assert facts["ExcNodeList"] == "n1" and facts["NumNodes"].startswith("2")
        cluster.run("scancel", successor)
