"""One node's part of the preflight, without torch: `python -m dtrain.launching.node_check …`.

Prints one line of JSON: the node's versions, GPUs, free space, whose files it sees in the run
folder, and how it reaches the next nodes. `judge.py` compares the lines of all nodes.
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
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dtrain
from dtrain.config.load import load_recipe
from dtrain.core.folders import cache_folder
from dtrain.core.hashes import file_sha256
from dtrain.core.nvidia import gpus
from dtrain.launching.address import address_of, own_address
from dtrain.launching.links import LinkServer, measure

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "numpy")
SEE_SECONDS = 30.0  # nodes whose file systems are cold come late
WAIT_SECONDS = 25.0
LINKS = 2  # each node measures so many; all of them together close a ring
PROBE = bytes(1 << 20)


def main(argv: list[str] | None = None) -> int:
    """Look, print the report."""
    parser = argparse.ArgumentParser(prog="dtrain.launching.node_check")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("meeting", type=Path, help="a folder that all nodes should see")
    parser.add_argument("nodes", nargs="+")
    arguments = parser.parse_args(argv)
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    report = {"node": name, **look(arguments.recipe)}
    report |= meet(name, arguments.nodes, arguments.meeting)
    # One write, so that the lines of several nodes do not mix.
    sys.stdout.write(f"{json.dumps(report)}\n")
    return 0


def look(recipe: Path) -> dict[str, Any]:
    """What this node can tell alone."""
    found: dict[str, Any] = {"versions": versions(), "gpus": gpus()}
    try:
        found["versions"]["recipe"] = file_sha256(recipe)[:12]
        base = load_recipe(str(recipe)).model.base
    except Exception as error:  # whatever it is, the report must come
        return found | {"problems": [f"the recipe cannot be read: {error}"], "free": {}}
    places = {"run folder": recipe.parent, "cache": cache_folder(), "temporary files": _temporary()}
    found["free"] = {name: free_bytes(place) for name, place in places.items()}
    problems = (could_not_write(place, name) for name, place in places.items())
    found["problems"] = [p for p in (*problems, unreadable_base(base)) if p]
    return found


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    found = {"python": platform.python_version(), "dtrain": dtrain.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def free_bytes(place: Path) -> int:
    """Free space for this user where `place` is or will be."""
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def could_not_write(place: Path, name: str) -> str | None:
    """Whether a megabyte can be written and kept there; a quota shows only so."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{name} {place}: {error.strerror or error}"
    return None


def unreadable_base(base: str) -> str | None:
    """What is wrong with a base model that is a folder; its tensors' heads are read."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        looks_like_path = base.startswith(("/", "~", "."))
        return f"base model {base}: there is no such folder" if looks_like_path else None
    try:
        for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
            with open(path, "rb") as file:
                head = file.read(8)
                if path.suffix == ".safetensors":
                    json.loads(file.read(struct.unpack("<Q", head)[0]))
    except (OSError, ValueError, struct.error) as error:
        return f"base model: {path}: {error}"
    return None


def meet(name: str, nodes: list[str], meeting: Path) -> dict[str, Any]:
    """Leave a file for the others, look whose files are seen, try the links to the next nodes."""
    address = own_address(os.environ) or address_of(name)
    server = LinkServer(address)
    card = {"address": address, "port": server.port}
    try:
        meeting.mkdir(parents=True, exist_ok=True)
        _leave(meeting / f"{name}.here", card)
        seen = await_files(meeting, ".here", nodes, SEE_SECONDS)
        cards = {node: json.loads((meeting / f"{node}.here").read_text()) for node in seen}
    except OSError as error:
        return {"seen": [], "links": {}, "meeting_problem": str(error)}
    at = nodes.index(name)
    next_nodes = [nodes[(at + i) % len(nodes)] for i in range(1, min(LINKS, len(nodes) - 1) + 1)]
    links = {node: measure(**cards[node]) for node in next_nodes if node in cards}
    _leave(meeting / f"{name}.done", {})
    await_files(meeting, ".done", seen, WAIT_SECONDS)  # they may still be talking to this node
    return {"seen": seen, "links": links}


def _leave(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def await_files(folder: Path, suffix: str, nodes: list[str], seconds: float) -> list[str]:
    """The nodes whose file is there, as soon as all are, or when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        names = set(os.listdir(folder))  # a listing makes a network file system look again
        seen = [node for node in nodes if f"{node}{suffix}" in names]
        if len(seen) == len(nodes) or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
