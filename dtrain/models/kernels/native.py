"""Calls the compiled CPU loops of loops.cpp, which are built at the first use on a machine.

The build takes a second, as it needs no torch headers. Without a compiler, and for tensors other
than plain float32 in CPU memory, callers compute the same with torch.
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.core.cpp_build import load_library

SOURCE = Path(__file__).with_name("loops.cpp")

# Argument types: p pointer, n integer, f float.
SIGNATURES = {
    "keep": "pnnn", "drop": "pppnf", "add_dropped": "pppnf",
    "swiglu": "pppn", "swiglu_backward": "pppppn",
    "rms_norm": "ppppnnf", "rms_norm_backward": "pppppnn",
    "rotary": "pnnpppnnnnnf", "cross_entropy": "pppnn",
    "attention": "pppppnnnnnnf", "attention_backward": "pppppppnnnnnnf",
    "add_scaled": "ppnf", "add_scaled_wide": "ppnf", "round_bfloat16": "pppn",
    "pack_4bit": "pppppnn",
}  # fmt: skip
TYPES = {"p": c_void_p, "n": c_int64, "f": c_float}
PLAIN = (Tensor, nn.Parameter)  # subclasses such as fake tensors have no memory to point to

_library: CDLL | None = None


def set_enabled(*, on: bool) -> str:
    """Turn the compiled loops on or off.

    Returns:
        Why they cannot be used; empty if they can, or if they were turned off.
    """
    global _library
    _library, why = load_loops() if on else (None, "")
    return why


def is_enabled() -> bool:
    """Whether the loops are in use."""
    return _library is not None


def supports(*tensors: Tensor) -> bool:
    """Whether the loops are on and can read these tensors."""
    return (
        is_enabled()
        and all(type(t) in PLAIN and t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def supports_contiguous(*tensors: Tensor) -> bool:
    """Whether the loops support these tensors and all of them are contiguous."""
    return supports(*tensors) and all(t.is_contiguous() for t in tensors)


def call(name: str, *arguments: Tensor | float) -> None:
    """Call a loop; they must be on."""
    call_in(_library, name, *arguments)


def call_in(loops: CDLL | None, name: str, *arguments: Tensor | float) -> None:
    """Call a loop of a library; tensors are passed as pointers."""
    values = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(loops, name)(*values)


def load_loops() -> tuple[CDLL | None, str]:
    """Load the loops, building them if needed; None and the reason where that fails."""
    libraries = Path(torch.__file__).parent / "lib"
    # torch's own OpenMP: a second one would start a second thread pool
    openmp = [f"-l:{path.name}" for path in sorted(libraries.glob("libgomp*.so*"))[:1]]
    links = ["-fopenmp", f"-L{libraries}", "-l:libtorch_cpu.so", *openmp]
    loops, why = load_library(SOURCE, links, torch.__version__)
    for name, letters in SIGNATURES.items() if loops else ():
        function = getattr(loops, name)
        function.argtypes = [TYPES[letter] for letter in letters]
        function.restype = None
    return loops, why
