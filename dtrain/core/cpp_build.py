"""C++ loops: built at the first use on a machine, kept in the cache, called through ctypes.

A library runs in this process, so it lies in a folder of the user's own and is not loaded from
where anybody else can write.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from ctypes import CDLL
from pathlib import Path

from dtrain.core.cache_paths import cache_folder
from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.ownership import own_file, own_folder

FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
WIDE = "-mprefer-vector-width=512"  # a hint that only compilers for x86 know
SECONDS = 120  # a build that takes longer hangs


def library(source: Path, flags: Iterable[str] = (), about: str = "") -> tuple[CDLL | None, str]:
    """The library of a C++ file, built if it is not there yet.

    Args:
        source: the file.
        flags: for the compiler, behind the file: what it links.
        about: what the build depends on besides.

    Returns:
        The library, or None and why it cannot be had.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, "no C++ compiler"
    name = f"{source.stem}-{_identity(source, compiler, [*flags, about])}.so"
    path = cache_folder() / f"loops-{os.getuid()}" / name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        own_folder(path.parent)  # a cache may be shared, what runs from it may not
        if not path.exists():
            _build(compiler, source, flags, path)
        return CDLL(str(own_file(path))), ""
    except UserError as error:
        return None, str(error)
    except (OSError, subprocess.SubprocessError):
        return None, f"{compiler} cannot build them"


def _identity(source: Path, compiler: str, beside: list[str]) -> str:
    """Of what a build depends on; a cache may be shared by machines of several kinds."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    resolved = str(Path(compiler).resolve())
    return fingerprint([source.read_text(), FLAGS, resolved, beside, features])


def _build(compiler: str, source: Path, flags: Iterable[str], path: Path) -> None:
    """Written beside its place and moved there: ranks may build at the same time."""
    wide = (WIDE,) if platform.machine() == "x86_64" else ()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        start = [compiler, *FLAGS, *wide, "-shared", "-fPIC", "-o", str(built), str(source)]
        done = [*start, *flags, "-Wl,-z,defs"]
        subprocess.run(done, check=True, capture_output=True, timeout=SECONDS)
        os.replace(built, path)
