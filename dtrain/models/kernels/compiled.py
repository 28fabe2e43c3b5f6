"""Fuses element-wise passes into one GPU kernel each, with torch.compile.

Matrix products and attention have their own kernels; everything between them is bound by memory
bandwidth, so each saved pass counts. On a CPU the loops of loops.cpp do this. Tests compile the
same functions for a CPU. Rotary positions are not compiled: torch 2.13 cannot do it for varying
sizes, and they take only two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dtrain.core.errors import first_line
from dtrain.core.log import warn
from dtrain.distributed.out_of_memory import is_out_of_memory
from dtrain.models.kernels.native import PLAIN

P = ParamSpec("P")
R = TypeVar("R")
# Round where separate passes would, so that losses equal those of `kernels: off` to the digit.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"emulate_precision_casts": True}

_failed: set[Callable[..., Any]] = set()
_enabled = True


def compile_on_gpu(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors when its first argument is on a GPU.

    If compiling fails, the function runs uncompiled from then on, after one warning.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if function in _failed or not should_compile(args[0]):
            return function(*args, **kwargs)
        return _try_compiled(function, args, kwargs)

    return call


def _try_compiled(function: Callable[..., R], args: Any, kwargs: Any) -> R:
    before = list(_versions(args))
    # torch would recompile for tensors that require a gradient, parameters and views
    plain = (a.detach() if isinstance(a, Tensor) else a for a in args)
    try:
        result: R = _compiled(function)(*plain, **kwargs)
    except Exception as error:  # of torch, triton or a compiler
        if is_out_of_memory(error) or before != list(_versions(args)):
            raise
        _failed.add(function)
        why = first_line(error)
        warn(f"kernels: {function.__name__} does not compile here, so it runs uncompiled: {why}")
        return function(*args, **kwargs)
    return result


def _versions(args: tuple[Any, ...]) -> Iterator[int]:
    """Version counters: a function that has written to an input must not run a second time."""
    return (a._version for a in args if isinstance(a, Tensor) and not a.is_inference())


def set_enabled(*, on: bool) -> None:
    """Turn compiling on or off; off for strict runs, as compiled sums depend on the shapes."""
    global _enabled
    _enabled = on


def should_compile(tensor: Any) -> bool:
    """Whether to compile for this tensor: on a GPU from Volta on, with triton.

    A single token stays uncompiled, as torch would recompile for it.
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
    """Compile a trivial function: triton also needs a C compiler and Python's headers."""
    if find_spec("triton") is None or torch.cuda.get_device_capability() < (7, 0):
        return False
    try:
        _compiled(torch.neg)(torch.zeros(8, device="cuda"))
    except Exception as error:  # of torch, triton or a compiler
        why = first_line(error)
        warn(f"kernels: torch.compile does not work here, so nothing is compiled: {why}")
        return False
    return True


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic: the number of target tokens varies, and queries and keys differ in heads
    return torch.compile(function, dynamic=True, options=OPTIONS)
