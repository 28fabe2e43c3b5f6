"""Build C++ kernels at their first use on a machine, cache them, and load them through ctypes.

A library runs in this process, so it is kept in a folder that only its user can write to.
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
from dtrain.core.ownership import check_own_file, check_own_folder

FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
X86_FLAG = "-mprefer-vector-width=512"
TIMEOUT_SECONDS = 120


def load_library(
    source: Path, flags: Iterable[str] = (), build_key: str = ""
) -> tuple[CDLL | None, str]:
    """Load the library of a C++ file; build it if it is not in the cache.

    Args:
        source: the C++ file.
        flags: compiler flags after the file, such as libraries to link.
        build_key: anything else that the build depends on.

    Returns:
        The library and "", or None and the reason.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, "no C++ compiler"
    name = f"{source.stem}-{_fingerprint(source, compiler, [*flags, build_key])}.so"
    path = cache_folder() / f"loops-{os.getuid()}" / name
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_own_folder(
            path.parent
        )  # others may share the cache, but must not be able to replace the library
        if not path.exists():
            _build(compiler, source, flags, path)
        return CDLL(str(check_own_file(path))), ""
    except UserError as error:
        return None, str(error)
    except (OSError, subprocess.SubprocessError):
        return None, f"{compiler} cannot build {source.name}"


def _fingerprint(source: Path, compiler: str, options: list[str]) -> str:
    """Hash what a build depends on; machines with different CPUs may share the cache."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(errors="replace").splitlines() if cpu_info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    resolved = str(Path(compiler).resolve())
    return fingerprint([source.read_text(encoding="utf-8"), FLAGS, resolved, options, features])


def _build(compiler: str, source: Path, flags: Iterable[str], path: Path) -> None:
    """Build in a temporary folder and move the result: ranks may build at the same time."""
    x86_flags = (X86_FLAG,) if platform.machine() == "x86_64" else ()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        options = [*FLAGS, *x86_flags, "-shared", "-fPIC", "-o", str(built)]
        command = [compiler, *options, str(source), *flags, "-Wl,-z,defs"]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
        os.replace(built, path)
