"""The documentation of Python's standard library, as installed on this machine.

Source files are parsed, never run. Only a fixed list of modules written in C is imported, because
their documentation exists nowhere else. The result is the same for one version of Python.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from dtrain.core.errors import UserError
from dtrain.extraction.python_code import Entry, parse, prose

# Modules that some distributions omit or later versions drop, tests, tables, private modules.
SKIPPED = {
    "__phello__",
    "antigravity",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "this",
    "tkinter",
    "turtle",
    "turtledemo",
}
C_MODULES = (
    "array",
    "binascii",
    "builtins",
    "cmath",
    "collections",
    "datetime",
    "decimal",
    "errno",
    "faulthandler",
    "functools",
    "gc",
    "io",
    "itertools",
    "marshal",
    "math",
    "operator",
    "select",
    "signal",
    "struct",
    "sys",
    "time",
    "unicodedata",
    "weakref",
    "zlib",
)


def entries() -> list[Entry]:
    """All public documented entries of the standard library, ordered by module and name."""
    by_name: dict[tuple[str, str], Entry] = {}
    for name, path in module_files(Path(sysconfig.get_paths()["stdlib"])):
        with suppress(UserError):  # files that test the parser
            for entry in parse(name, path.read_text(encoding="utf-8", errors="replace")):
                by_name.setdefault((entry.module, entry.name), entry)
    for name in C_MODULES:
        for entry in inspected(name):
            by_name.setdefault((entry.module, entry.name), entry)
    return [by_name[key] for key in sorted(by_name)]


def help_topics() -> dict[str, str]:
    """The topics of `help()`, such as 'LAMBDAS'; none where a distribution leaves them out."""
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:
        return {}


def module_files(folder: Path, package: str = "") -> Iterator[tuple[str, Path]]:
    """Name and file of every public module under `folder`, sorted."""
    for path in sorted(folder.iterdir()):
        if path.stem.startswith("_") or path.name in SKIPPED or path.stem in SKIPPED:
            continue
        if path.suffix == ".py":
            yield package + path.stem, path
        elif (path / "__init__.py").is_file():
            yield package + path.name, path / "__init__.py"
            yield from module_files(path, f"{package}{path.name}.")


def inspected(name: str) -> Iterator[Entry]:
    """The public documented entries of a module written in C; none if it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    if doc := inspect.getdoc(module):
        yield Entry(name, "", "module", None, (), doc)
    for member, item in sorted(vars(module).items()):
        if not member.startswith("_") and _is_of_c(item, module):
            yield from _inspected(name, member, item)


def _is_of_c(item: object, module: ModuleType) -> bool:
    """Whether it is a builtin that belongs to `module` and has no Python source."""
    home = getattr(item, "__module__", None)
    belongs = home in (module.__name__, f"_{module.__name__}", "builtins")
    if home == "builtins" and module.__name__ != "builtins":
        belongs = False
    is_plain = inspect.isbuiltin(item) or inspect.isclass(item)
    return belongs and is_plain and not inspect.isfunction(item)


def _inspected(module: str, name: str, item: object) -> Iterator[Entry]:
    doc = _docstring(item)
    if inspect.isclass(item):
        bases = tuple(base.__name__ for base in item.__bases__ if base is not object)
        if doc:
            yield Entry(module, name, "class", _arguments(item), bases, doc)
        for member, value in sorted(vars(item).items()):
            is_public_method = not member.startswith("_") and inspect.ismethoddescriptor(value)
            if is_public_method and (item_doc := _docstring(value)):
                yield Entry(module, f"{name}.{member}", "method", _arguments(value), (), item_doc)
    elif doc:
        yield Entry(module, name, "function", _arguments(item), (), doc)


def _docstring(item: object) -> str:
    doc = getattr(item, "__doc__", None)
    return prose(inspect.cleandoc(doc)) if isinstance(doc, str) else ""


def _arguments(item: object) -> str | None:
    try:
        text = str(inspect.signature(item))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, NameError):
        return None  # the last two: defaults that inspect of Python 3.13 cannot evaluate
    text = re.sub(r"^\(\$?self(, /)?(, )?", "(", text.partition(" -> ")[0])
    return None if " at 0x" in text else text.replace("(/, ", "(")
