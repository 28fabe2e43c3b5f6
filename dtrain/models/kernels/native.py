"""loops.cpp: built at the first use on a machine, called through ctypes.

No header of torch is needed, so it takes a second. Where there is no compiler, or the library does
not link, or a tensor is not plain float32 in a CPU's memory, the same is computed by torch.
"""

from __future__ import annotations

from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.core.cpp_build import load_library

SOURCE = Path(__file__).with_name("loops.cpp")

# Arguments by letters: p a pointer, n an integer, f a float.
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


def is_on() -> bool:
    """Whether the loops are in use."""
    return _library is not None


def fits(*tensors: Tensor) -> bool:
    """Whether the loops may work on these tensors."""
    return (
        is_on()
        and all(type(t) in PLAIN and t.dtype == torch.float32 and t.is_cpu for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def fits_flat(*tensors: Tensor) -> bool:
    """Whether they fit and are laid out without gaps."""
    return fits(*tensors) and all(t.is_contiguous() for t in tensors)


def call(name: str, *arguments: Tensor | float) -> None:
    """Call a loop of those in use."""
    call_of(_library, name, *arguments)


def call_of(loops: CDLL | None, name: str, *arguments: Tensor | float) -> None:
    """Call a loop; tensors are given as where they lie."""
    given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    getattr(loops, name)(*given)


def find() -> tuple[CDLL | None, str]:
    """The loops, built if they are not there; or why there are none."""
    libraries = Path(torch.__file__).parent / "lib"
    # torch's own OpenMP: two of them would keep two pools of threads.
    openmp = [f"-l:{own.name}" for own in sorted(libraries.glob("libgomp*.so*"))[:1]]
    links = ["-fopenmp", f"-L{libraries}", "-l:libtorch_cpu.so", *openmp]
    found, why = load_library(SOURCE, links, torch.__version__)
    for name, letters in SIGNATURES.items() if found else ():
        function = getattr(found, name)
        function.argtypes = [TYPES[letter] for letter in letters]
        function.restype = None
    return found, why
