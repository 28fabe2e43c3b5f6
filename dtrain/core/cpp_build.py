"""Build C++ kernels at their first use on a machine, cache them, and load them through ctypes.

A library runs in this process, so it is kept in a folder that only its user can write to. The hash
of its content is a part of its name: a copy that was cut short or damaged would kill the process
when it is loaded or called, so it is found here and built again.
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
from dtrain.core.files import fsync_file, fsync_folder
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.ownership import check_own_file, check_own_folder

FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
X86_FLAG = "-mprefer-vector-width=512"
TIMEOUT_SECONDS = 120
HASH_DIGITS = 32


def load_library(
    source: Path, flags: Iterable[str] = (), build_key: str = ""
) -> tuple[CDLL | None, str]:
    """Load the library of a C++ file; build it if it is not in the cache, or damaged there.

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
    try:
        folder = cache_folder() / f"loops-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Others may share the cache, but must not be able to replace the library.
        check_own_folder(folder)
        name = f"{source.stem}-{_fingerprint(source, compiler, [*flags, build_key])}"
        path = _find(folder, name) or _build(compiler, source, flags, folder, name)
        return CDLL(str(path)), ""
    except UserError as error:
        return None, str(error)
    except subprocess.SubprocessError:
        return None, f"{compiler} cannot build {source.name}"
    except OSError as error:
        return None, f"{source.name} cannot be built or loaded: {error}"


def _find(folder: Path, name: str) -> Path | None:
    """The whole library `name-HASH.so`; damaged ones are not returned.

    Raises:
        Untrusted: another user could have written it.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.name == _named(name, check_own_file(path)):
            return path
    return None


def _named(name: str, library: Path) -> str:
    return f"{name}-{file_hash(library)[:HASH_DIGITS]}.so"


def _fingerprint(source: Path, compiler: str, options: list[str]) -> str:
    """Hash what a build depends on; machines with different CPUs may share the cache."""
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text(encoding="utf-8", errors="replace") if cpu_info.exists() else ""
    lines = text.splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    resolved = str(Path(compiler).resolve())
    return fingerprint([source.read_text(encoding="utf-8"), FLAGS, resolved, options, features])


def _build(compiler: str, source: Path, flags: Iterable[str], folder: Path, name: str) -> Path:
    """Build in a temporary folder and move the result: ranks may build at the same time."""
    x86_flags = (X86_FLAG,) if platform.machine() == "x86_64" else ()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / "library.so"
        options = [*FLAGS, *x86_flags, "-shared", "-fPIC", "-o", str(built)]
        command = [compiler, *options, str(source), *flags, "-Wl,-z,defs"]
        subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
        fsync_file(built)
        path = folder / _named(name, built)
        os.replace(built, path)
    fsync_folder(folder)
    return path
