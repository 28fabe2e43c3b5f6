"""Compare the reports of the nodes: what is wrong, and with which node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dtrain.core.units import size

Report = dict[str, Any]

MIN_FREE_BYTES = 1e9
MAX_CLOCK_SECONDS = 2.0  # a run's files are compared by their times
MAX_MILLISECONDS = 10.0
MIN_MEGABYTES_PER_SECOND = 50.0
MIN_SHARE_OF_MEDIAN = 0.25
MAX_GPU_MEMORY_USED = 0.05


@dataclass(frozen=True)
class Fault:
    """Something wrong; `node` is empty if no single node is at fault."""

    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}" if self.node else self.message


def find_faults(reports: Sequence[Report], nodes: Sequence[str], gpus: int) -> list[Fault]:
    """Find every fault.

    Args:
        reports: lines of node_probe, as far as they arrived.
        nodes: the job's nodes; the others are compared with the first.
        gpus: that each node should have; 0 if the recipe uses none.
    """
    by_node = {report["node"]: report for report in reports}
    present = [by_node[node] for node in nodes if node in by_node]
    silent = [Fault(n, "did not report: does it see the checkout and the Python environment?")
              for n in nodes if n not in by_node]  # fmt: skip
    return [
        *silent,
        *(Fault(r["node"], problem) for r in present for problem in r["problems"]),
        *_versions(present),
        *(fault for report in present for fault in _gpus(report, gpus)),
        *(fault for report in present for fault in _free(report)),
        *_shared(present),
        *_links(present),
    ]


def _versions(reports: Sequence[Report]) -> Iterator[Fault]:
    names = dict.fromkeys(name for report in reports for name in report["versions"])
    for name in names:
        values = [report["versions"].get(name, "missing") for report in reports]
        # In a tie the first node wins.
        usual = Counter(values).most_common(1)[0][0]
        for report, value in zip(reports, values, strict=True):
            if value != usual:
                yield Fault(report["node"], f"{name} is {value}; elsewhere it is {usual}")


def _gpus(report: Report, expected: int) -> Iterator[Fault]:
    if not expected or report["gpus"] is None:
        return
    present, node = report["gpus"], report["node"]
    if len(present) < expected:
        yield Fault(node, f"{len(present)} GPUs instead of {expected}")
    for gpu in present:
        if problem := gpu.get("problem"):
            yield Fault(node, problem)
            continue
        name = f"GPU {gpu.get('index')}"
        used, total = _number(gpu.get("memory.used")), _number(gpu.get("memory.total"))
        if total and used > MAX_GPU_MEMORY_USED * total:
            yield Fault(node, f"{name}: {used:.0f} of {total:.0f} MiB are used by another process")
        if errors := _number(gpu.get("ecc.errors.uncorrected.volatile.total")):
            yield Fault(node, f"{name}: {errors:.0f} uncorrected memory errors")


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:  # "[N/A]"
        return 0.0


def _free(report: Report) -> Iterator[Fault]:
    for folder, free in report["free"].items():
        if free < MIN_FREE_BYTES:
            yield Fault(report["node"], f"{folder}: only {size(free)} free")


def _shared(reports: Sequence[Report]) -> Iterator[Fault]:
    for report in reports:
        if problem := report.get("meeting_problem"):
            yield Fault(report["node"], f"cannot write into the run folder: {problem}")
    if not reports or reports[0].get("meeting_problem"):
        return
    first = reports[0]
    for report in reports[1:]:
        if report["node"] not in first["seen"] and not report.get("meeting_problem"):
            message = f"its files in the run folder are not seen by {first['node']}: not shared"
            yield Fault(report["node"], message)


def _links(reports: Sequence[Report]) -> list[Fault]:
    links = [(r["node"], to, link) for r in reports for to, link in r["links"].items()]
    speeds = [link["megabytes_per_second"] for _, _, link in links if "problem" not in link]
    usual = median(speeds) if speeds else 0.0
    least = max(MIN_MEGABYTES_PER_SECOND, MIN_SHARE_OF_MEDIAN * usual)
    bad = [(a, b, problem) for a, b, link in links if (problem := _bad_link(link, least))]
    # A node at an end of every bad link is at fault.
    ends = Counter(end for a, b, _ in bad for end in {a, b})
    common = [node for node, count in ends.items() if count == len(bad)]
    node_at_fault = common[0] if len(common) == 1 else ""
    return [Fault(node_at_fault, f"from {a} to {b}: {problem}") for a, b, problem in bad]


def _bad_link(link: dict[str, Any], least: float) -> str:
    if "problem" in link:
        return f"cannot be reached: {link['problem']}"
    if abs(link["clock_seconds"]) > MAX_CLOCK_SECONDS:
        return f"the clocks differ by {abs(link['clock_seconds']):.1f} s"
    if link["megabytes_per_second"] < least:
        return f"slow: {link['megabytes_per_second']:.0f} MB/s"
    if link["milliseconds"] > MAX_MILLISECONDS:
        return f"slow: {link['milliseconds']:.0f} ms there and back"
    return ""
