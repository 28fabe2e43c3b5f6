"""Element-wise passes of a GPU made into one kernel each, by torch.compile.

Matrix products and attention have kernels of their own; what lies between them is bound by memory,
and every pass that is saved counts. On a CPU the compiled loops do this. Never run on a GPU here;
the same compilation for a CPU is what a test compares with. Rotary positions are left out: torch
2.13 cannot compile them for sizes that vary, and they take but two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dtrain.core.log import warn
from dtrain.models.kernels.native import PLAIN

P = ParamSpec("P")
R = TypeVar("R")
# Round where the passes one by one would: the losses of `kernels: off`, to the same digits.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}

_failed: set[Callable[..., Any]] = set()
_enabled = True


def compile_on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """`function` of tensors, the first of which says where all of them are.

    Where it does not compile, it runs pass by pass from then on, with one warning.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if function in _failed or not compiles(args[0]):
            return function(*args, **kwargs)
        return _try_compiled(function, args, kwargs)

    return call


def _try_compiled(function: Callable[..., R], args: Any, kwargs: Any) -> R:
    before = list(_versions(args))
    # Torch would compile again for what requires a gradient, is a parameter or a view.
    bare = (a.detach() if isinstance(a, Tensor) else a for a in args)
    try:
        result: R = _compiled(function)(*bare, **kwargs)
    except Exception as error:  # of torch, triton or a compiler
        if _is_out_of_memory(error) or before != list(_versions(args)):
            raise
        _failed.add(function)
        why = str(error).strip().split("\n")[0]
        warn(f"kernels: {function.__name__} does not compile here, its passes stay apart: {why}")
        return function(*args, **kwargs)
    return result


def _versions(args: tuple[Any, ...]) -> Iterator[int]:
    """Change where a tensor is written to: a function that began to write cannot start again."""
    return (a._version for a in args if isinstance(a, Tensor) and not a.is_inference())


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def switch(*, on: bool) -> None:
    """Compile from now on, or never: what a compiled sum adds up first depends on shapes."""
    global _enabled
    _enabled = on


def compiles(tensor: Any) -> bool:
    """Whether torch.compile works on this tensor's device: a GPU from Volta on, with triton.

    One token is left alone: torch compiles again for it.
    """
    return (
        _enabled
        and type(tensor) in PLAIN
        and tensor.is_cuda
        and tensor.numel() > tensor.shape[-1]
        and _gpu_compiles()
    )


@cache
def _gpu_compiles() -> bool:
    """Tried on a trifle: triton wants a C compiler and Python's headers beside it."""
    if find_spec("triton") is None or torch.cuda.get_device_capability() < (7, 0):
        return False
    try:
        _compiled(torch.neg)(torch.zeros(8, device="cuda"))
    except Exception as error:  # of torch, triton or a compiler
        why = str(error).strip().split("\n")[0]
        warn(f"kernels: torch.compile does not work here, passes stay apart: {why}")
        return False
    return True


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # of any size: rows differ in what is learnt, heads of queries and keys in number
    return torch.compile(function, dynamic=True, options=OPTIONS)
