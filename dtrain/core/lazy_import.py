"""Import modules late, fast or not at all: every start of a rank pays for its imports."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

DISABLE_DYNAMO = "TORCHDYNAMO_DISABLE"


class LazyModule:
    """A module that is imported at the first access to one of its attributes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def import_fast(name: str) -> ModuleType:
    """Import a module and its dependencies without garbage collection and without torch.compile.

    The garbage collector would repeatedly scan thousands of modules that stay alive. bitsandbytes
    wraps four functions in `torch.compile` on import, which imports torch's whole compiler; here
    they stay uncompiled. `torch.compile` works normally afterwards.
    """
    before = os.environ.get(DISABLE_DYNAMO)
    os.environ[DISABLE_DYNAMO] = "1"
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.enable()
        gc.freeze()
        if before is None:
            del os.environ[DISABLE_DYNAMO]
        else:
            os.environ[DISABLE_DYNAMO] = before


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of these packages that are installed, without importing them."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def import_object(path: str) -> Any:
    """Import what "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
