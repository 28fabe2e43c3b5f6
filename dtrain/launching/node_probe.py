"""Probe one node for the preflight, without torch: `python -m dtrain.launching.node_probe …`.

Prints one line of JSON: the node's versions, GPUs, free space, whose files it sees in the run
folder, and its links to the next nodes. node_checks.py compares the lines of all nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import dtrain
from dtrain.core.cache_paths import compile_folder, hub_id, local_path, sample_name
from dtrain.core.errors import UserError
from dtrain.core.hardware import gpus
from dtrain.core.hashes import file_hash
from dtrain.core.lazy_import import installed_versions
from dtrain.core.weight_files import read_header, undownloaded, weight_files
from dtrain.launching.network import address_of, own_address

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy")
SEE_SECONDS = 30.0  # nodes whose file systems are cold come late
WAIT_SECONDS = 25.0
LINKS = 2  # each node measures so many; all of them together close a ring
PROBE = bytes(1 << 20)
TIMEOUT_SECONDS = 5.0
SEND_SECONDS = 1.0
SEND_BYTES = 64 << 20
CHUNK = bytes(256 << 10)
PINGS = 5
TRIES = 2  # of a link: one stall of a busy machine does not make it slow
TIME = struct.Struct("!d")


def main(argv: list[str] | None = None) -> int:
    """Probe this node, print the report."""
    parser = argparse.ArgumentParser(prog="dtrain.launching.node_probe")
    parser.add_argument("base", help="model.base of the recipe")
    parser.add_argument("--revision", help="of a base on the hub")
    parser.add_argument("recipe", type=Path, help="the resolved recipe")
    parser.add_argument("meeting", type=Path, help="a folder that all nodes should see")
    parser.add_argument("nodes", nargs="+")
    arguments = parser.parse_args(argv)
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = {"node": name, **probe(arguments.base, arguments.recipe, arguments.revision)}
    report |= probe_links(name, arguments.nodes, arguments.meeting)
    # One write, so that the lines of several nodes do not mix.
    sys.stdout.write(f"{json.dumps(report)}\n")
    return 0


def probe(base: str, recipe: Path, revision: str | None = None) -> dict[str, Any]:
    """Everything but the links to other nodes.

    Args:
        base: model of the recipe.
        recipe: file of the resolved recipe, in the run folder.
        revision: of a base on the hub.
    """
    report: dict[str, Any] = {"versions": versions(), "gpus": gpus()}
    try:
        report["versions"]["recipe"] = file_hash(recipe)[:12]
    except OSError as error:
        return report | {"problems": [f"the recipe cannot be read: {error}"], "free": {}}
    folders = {
        "run folder": recipe.parent,
        "cache": compile_folder(),  # one that cannot be written to may hold all that is needed
        "temporary files": _temporary(),
    }
    report["free"] = {name: free_bytes(folder) for name, folder in folders.items()}
    problems = (write_problem(folder, name) for name, folder in folders.items())
    report["problems"] = [p for p in (*problems, base_problem(base, revision)) if p]
    return report


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def versions() -> dict[str, str]:
    """Versions that must be the same on every node."""
    own = {"python": platform.python_version(), "dtrain": dtrain.__version__}
    return own | dict.fromkeys(PACKAGES, "missing") | installed_versions(PACKAGES)


def free_bytes(folder: Path) -> int:
    """Free space for this user where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_problem(folder: Path, name: str) -> str | None:
    """Write a megabyte, since only that reveals a quota; return what went wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{name} {folder}: {error.strerror or error}"
    return None


def base_problem(base: str, revision: str | None = None) -> str | None:
    """What is wrong with a base model on this node; the headers of its weights are read."""
    if hub_id(base):
        problem = undownloaded(base, revision)
        if not problem or os.environ.get("DTRAIN_FORCE") == "1":
            return None
        return f"base model: {problem}: dtrain model fetch {base}"
    folder = local_path(base)
    if not folder.is_dir():
        is_sample = sample_name(base) is not None
        return None if is_sample else f"base model {base}: there is no such folder"
    try:
        with open(folder / "config.json", "rb"):
            pass
        for path in weight_files(folder):
            read_header(path)
    except OSError as error:
        return f"base model: {folder}: {error}"
    except UserError as error:
        return f"base model: {error.where}: {error.message}"
    return None


def probe_links(name: str, nodes: list[str], meeting: Path) -> dict[str, Any]:
    """Check whose files this node sees in the run folder; measure the links to the next nodes."""
    address = own_address(os.environ) or address_of(name)
    server = LinkServer(address)
    card = {"address": address, "port": server.port}
    try:
        meeting.mkdir(parents=True, exist_ok=True)
        _leave(meeting / f"{name}.here", card)
        seen = await_files(meeting, ".here", nodes, SEE_SECONDS)
        cards = {
            node: json.loads((meeting / f"{node}.here").read_text(encoding="utf-8"))
            for node in seen
        }
        links = {node: measure(**cards[node]) for node in _next(name, nodes) if node in cards}
        _leave(meeting / f"{name}.done", {})
        # They may still be measuring a link to this node.
        await_files(meeting, ".done", seen, WAIT_SECONDS)
    except OSError as error:
        return {"seen": [], "links": {}, "meeting_problem": str(error)}
    return {"seen": seen, "links": links}


def _next(name: str, nodes: list[str]) -> list[str]:
    """The nodes to which a node measures its links."""
    at = nodes.index(name)
    return [nodes[(at + i) % len(nodes)] for i in range(1, min(LINKS, len(nodes) - 1) + 1)]


def _leave(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)


def await_files(folder: Path, suffix: str, nodes: list[str], seconds: float) -> list[str]:
    """Wait for a file of each node; return the nodes whose file exists."""
    deadline = time.monotonic() + seconds
    while True:
        names = set(os.listdir(folder))  # a listing refreshes a network file system
        seen = [node for node in nodes if f"{node}{suffix}" in names]
        if len(seen) == len(nodes) or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


class LinkServer:
    """Answers pings with the time of day, and receives what other nodes send."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=128)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    """Answer PINGS bytes, then receive until the sender is done."""
    with connection, suppress(OSError):
        connection.settimeout(TIMEOUT_SECONDS * 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(PINGS):
            if not connection.recv(1):
                return
            connection.sendall(TIME.pack(time.time()))
        while connection.recv(len(CHUNK)):
            pass
        connection.sendall(b"!")


def measure(address: str, port: int) -> dict[str, float | str]:
    """Measure one link.

    Returns:
        milliseconds (round trip), megabytes_per_second, clock_seconds (the other
        clock minus this one); or `problem`.
    """
    pings, speeds = [], []
    try:
        for _ in range(TRIES):
            with socket.create_connection((address, port), timeout=TIMEOUT_SECONDS) as link:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pings += [_ping(link) for _ in range(PINGS)]
                speeds.append(_send(link))
    except OSError as error:
        return {"problem": str(error) or type(error).__name__}
    (trip, clock), speed = min(pings), max(speeds)
    return {
        "milliseconds": round(trip * 1e3, 3),
        "megabytes_per_second": round(speed / 1e6, 1),
        "clock_seconds": round(clock, 3),
    }


def _ping(link: socket.socket) -> tuple[float, float]:
    wall, started = time.time(), time.perf_counter()
    link.sendall(b"?")
    there = TIME.unpack(_receive(link, TIME.size))[0]
    trip = time.perf_counter() - started
    return trip, there - (wall + trip / 2)


def _send(link: socket.socket) -> float:
    """Bytes a second that arrive, over a second at most."""
    link.settimeout(TIMEOUT_SECONDS * 3)  # for what is in the buffers of a slow link
    sent, started = 0, time.perf_counter()
    while sent < SEND_BYTES and time.perf_counter() - started < SEND_SECONDS:
        sent += link.send(CHUNK)
    link.shutdown(socket.SHUT_WR)
    _receive(link, 1)
    return sent / (time.perf_counter() - started)


def _receive(link: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += (received := link.recv(size - len(data)))
        if not received:
            raise ConnectionError("the other node closed the connection")
    return data


if __name__ == "__main__":
    sys.exit(main())
