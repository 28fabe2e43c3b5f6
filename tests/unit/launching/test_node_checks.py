"""Comparing the reports of the nodes."""

from __future__ import annotations

from copy import deepcopy

from dtrain.launching.node_checks import find_faults

NODES = ["n0", "n1", "n2"]
LINK = {"milliseconds": 0.1, "megabytes_per_second": 2000.0, "clock_seconds": 0.0}
GPU = {"index": "0", "memory.total": "81920", "memory.used": "3", "name": "H100"}
GPU |= {"ecc.errors.uncorrected.volatile.total": "[N/A]"}


def reports() -> dict[str, dict]:
    ring = {node: NODES[(i + 1) % 3] for i, node in enumerate(NODES)}
    return {
        node: {
            "node": node,
            "versions": {"torch": "2.13.0", "recipe": "abc"},
            "gpus": [dict(GPU), dict(GPU)],
            "free": {"run folder": 5e12},
            "problems": [],
            "seen": list(NODES),
            "links": {ring[node]: dict(LINK)},
        }
        for node in NODES
    }


def faults_after(change) -> list[str]:
    changed = deepcopy(reports())
    change(changed)
    return [str(fault) for fault in find_faults(list(changed.values()), NODES, gpus=2)]


def test_healthy_nodes_have_no_faults():
    assert faults_after(lambda r: None) == []


def test_node_with_another_version_is_named():
    def change(r):
        r["n0"]["versions"]["torch"] = "2.12.0"

    assert faults_after(change) == ["n0: torch is 2.12.0; elsewhere it is 2.13.0"]


def test_silent_node_is_named():
    assert "n2: did not report" in faults_after(lambda r: r.pop("n2"))[0]


def test_missing_busy_or_broken_gpus_are_reported():
    def change(r):
        r["n1"]["gpus"] = [GPU | {"memory.used": "40000"}]
        r["n2"]["gpus"][1] = GPU | {"ecc.errors.uncorrected.volatile.total": "4"}

    assert faults_after(change) == [
        "n1: 1 GPUs instead of 2",
        "n1: GPU 0: 40000 of 81920 MiB are used by another process",
        "n2: GPU 0: 4 uncorrected memory errors",
    ]


def test_slow_links_name_the_shared_node():
    def change(r):
        r["n0"]["links"]["n1"] = LINK | {"megabytes_per_second": 100.0}
        r["n1"]["links"]["n2"] = {"problem": "timed out"}

    assert faults_after(change) == [
        "n1: from n0 to n1: slow: 100 MB/s",
        "n1: from n1 to n2: cannot be reached: timed out",
    ]


def test_clock_disk_space_and_folder_faults_are_reported():
    def change(r):
        r["n1"]["links"]["n2"] = LINK | {"clock_seconds": -90.0}
        r["n2"]["free"]["run folder"] = 3e6
        r["n0"]["seen"] = ["n0", "n1"]

    assert faults_after(change) == [
        "n2: run folder: only 3 MB free",
        "n2: its files in the run folder are not seen by n0: not shared",
        "from n1 to n2: the clocks differ by 90.0 s",
    ]
