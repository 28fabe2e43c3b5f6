"""The documentation of Python's standard library, as installed on this machine.

Source files are parsed, never run. Only a fixed list of modules written in C is imported, because
their documentation exists nowhere else. The result is the same for one version of Python.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

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


@dataclass(frozen=True)
class Entry:
    """One documented module, class, function, method or property.

    Attributes:
        module: full name of its module.
        name: name inside the module, such as "JSONDecoder.decode"; "" for the module itself.
        kind: module, class, function, method or property.
        arguments: as in a call, "(s, width=70)", without self; None if they are not known.
        bases: names of the base classes.
        doc: its docstring, without indentation.
    """

    module: str
    name: str
    kind: str
    arguments: str | None
    bases: tuple[str, ...]
    doc: str

    @property
    def full_name(self) -> str:
        """'json.JSONDecoder.decode'; without the module for what needs no import."""
        if not self.name:
            return self.module
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"

    @property
    def heading(self) -> str:
        """How the documentation would show it: 'class json.JSONDecoder(*, object_hook=None)'."""
        prefix = f"{self.kind} " if self.kind in ("module", "class") else ""
        return f"{prefix}{self.full_name}{self.arguments or ''}"


def entries() -> list[Entry]:
    """All public documented entries of the standard library, ordered by module and name."""
    by_name: dict[tuple[str, str], Entry] = {}
    for name, path in module_files(Path(sysconfig.get_paths()["stdlib"])):
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


def parse(module: str, source: str) -> Iterator[Entry]:
    """The public documented entries in a module's source, which is not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old docstrings
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    if doc := _prose(ast.get_docstring(tree)):
        yield Entry(module, "", "module", None, (), doc)
    for node in _definitions(tree.body):
        yield from _parsed(module, "", node)


def _definitions(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Functions and classes of a body, including those under `if` and `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions(node.body)


def _parsed(module: str, owner: str, node: ast.stmt) -> Iterator[Entry]:
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    if node.name.startswith("_"):
        return
    name, doc = owner + node.name, _prose(ast.get_docstring(node))
    if isinstance(node, ast.ClassDef):
        bases = tuple(ast.unparse(base) for base in node.bases)
        if doc:
            yield Entry(module, name, "class", _constructor(node), bases, doc)
        for member in _definitions(node.body):
            if not isinstance(member, ast.ClassDef):
                yield from _parsed(module, f"{name}.", member)
    elif doc:
        yield Entry(module, name, *_callable(node, method=bool(owner)), (), doc)


def _callable(
    node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool
) -> tuple[str, str | None]:
    """Kind and arguments of a function."""
    decorators = {ast.unparse(x).split(".")[-1] for x in node.decorator_list}
    if decorators & {"property", "cached_property", "setter", "getter", "deleter"}:
        return "property", None
    arguments = ast.unparse(node.args)
    if method and "staticmethod" not in decorators:
        arguments = arguments.partition(", ")[2].removeprefix("/, ")
    return ("method" if method else "function"), f"({arguments})"


def _constructor(node: ast.ClassDef) -> str | None:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            return _callable(member, method=True)[1]
    return None


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
    return _prose(inspect.cleandoc(doc)) if isinstance(doc, str) else ""


def _prose(doc: str | None) -> str:
    """A docstring; "" for one that is nothing but a test."""
    return "" if doc is None or doc.startswith(">>>") else doc


def _arguments(item: object) -> str | None:
    try:
        text = str(inspect.signature(item))  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, NameError):
        return None  # the last two: defaults that inspect of Python 3.13 cannot evaluate
    text = re.sub(r"^\(\$?self(, /)?(, )?", "(", text.partition(" -> ")[0])
    return None if " at 0x" in text else text.replace("(/, ", "(")
