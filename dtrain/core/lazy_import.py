"""Importing as little, and as late, as a run needs: every start of a rank pays for it."""

from __future__ import annotations

import gc
import os
from importlib import import_module
from types import ModuleType
from typing import Any

NO_COMPILER = "TORCHDYNAMO_DISABLE"


class LazyModule:
    """A module that is imported when it is first asked for something."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def import_fast(name: str) -> ModuleType:
    """Import a module with all that it needs, without what only makes that slow.

    The garbage collector would look again and again at thousands of modules that stay for good.
    bitsandbytes wraps four functions in `torch.compile` when it is imported, which imports torch's
    whole compiler; they run as they are instead, and `torch.compile` works as ever afterwards.
    """
    before = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.enable()
        gc.freeze()
        if before is None:
            del os.environ[NO_COMPILER]
        else:
            os.environ[NO_COMPILER] = before
