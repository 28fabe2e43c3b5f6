"""loops.cpp: built at the first use on a machine, kept in the cache, called through ctypes.

No header of torch is needed, so it takes a second. Where there is no compiler, or the library does
not link, or a tensor is not plain float32 in a CPU's memory, the same is computed by torch.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.core.errors import UserError
from dtrain.core.folders import cache_folder
from dtrain.core.hashes import fingerprint
from dtrain.core.trust import own_file, own_folder

SOURCE = Path(__file__).with_name("loops.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
WIDE = "-mprefer-vector-width=512"  # a hint that only compilers for x86 know
SECONDS = 120  # a build that takes longer hangs

# Arguments by letters: p a pointer, n an integer, f a float.
SIGNATURES = {
    "keep": "pnnn", "drop": "pppnf", "add_dropped": "pppnf",
    "swiglu": "pppn", "swiglu_backward": "pppppn",
    "rms_norm": "ppppnnf", "rms_norm_backward": "pppppnn",
    "rotary": "pnnpppnnnnnf", "cross_entropy": "pppnn",
    "attention": "pppppnnnnnnf", "attention_backward": "pppppppnnnnnnf",
    "add_scaled": "ppnf", "add_scaled_wide": "ppnf", "round_bfloat16": "pppn",
}  # fmt: skip
TYPES = {"p": c_void_p, "n": c_int64, "f": c_float}
PLAIN = (Tensor, nn.Parameter)  # no other class: fakes and shards have no memory to point at

_library: CDLL | None = None


def switch(*, on: bool) -> str:
    """Use the loops from now on, or torch in their place.

    Returns:
        Why they are not used; empty if they are.
    """
    global _library
    _library, why = (None, "") if not on else find()
    return why


def fits(*tensors: Tensor) -> bool:
    """Whether the loops may work on these tensors."""
    return (
        _library is not None
        and all(type(t) in PLAIN and t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def fits_flat(*tensors: Tensor) -> bool:
    """Whether they fit and are laid out without gaps."""
    return fits(*tensors) and all(t.is_contiguous() for t in tensors)


def call(name: str, *arguments: Tensor | float) -> None:
    """Call a loop of those in use."""
    call_of(_library, name, *arguments)


def call_of(library: CDLL | None, name: str, *arguments: Tensor | float) -> None:
    """Call a loop; tensors are given as where they lie."""
    given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(library, name)(*given)


def find() -> tuple[CDLL | None, str]:
    """The loops, built if they are not there; or why there are none."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        return None, "no C++ compiler"
    path = cache_folder() / f"loops-{os.getuid()}" / f"{_identity(compiler)}.so"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        own_folder(path.parent)  # a cache may be shared, what runs from it may not
        if not path.exists():
            _build(compiler, path)
        return _load(own_file(path)), ""
    except UserError as error:
        return None, str(error)
    except (OSError, subprocess.SubprocessError):
        return None, f"{compiler} cannot build them"


def _identity(compiler: str) -> str:
    """Of what a build depends on; a cache may be shared by machines of several kinds."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    resolved = str(Path(compiler).resolve())
    return fingerprint([SOURCE.read_text(), FLAGS, resolved, torch.__version__, features])


def _build(compiler: str, path: Path) -> None:
    """Written beside its place and moved there: ranks may build at the same time."""
    libraries = Path(torch.__file__).parent / "lib"
    wide = (WIDE,) if platform.machine() == "x86_64" else ()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [
                compiler, *FLAGS, *wide, "-shared", "-fPIC", "-o", str(built), str(SOURCE),
                f"-L{libraries}", "-l:libtorch_cpu.so", *_openmp(libraries), "-Wl,-z,defs",
            ],
            check=True, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
        os.replace(built, path)


def _openmp(libraries: Path) -> list[str]:
    """torch's own OpenMP: two of them would keep two pools of threads."""
    return [f"-l:{own.name}" for own in sorted(libraries.glob("libgomp*.so*"))[:1]]


def _load(path: Path) -> CDLL:
    library = CDLL(str(path))
    for name, letters in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [TYPES[letter] for letter in letters]
        function.restype = None
    return library
