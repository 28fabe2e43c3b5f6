"""The documented entries of Python sources: signatures and docstrings. Nothing is run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from dtrain.core.errors import UserError, first_line


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
        line: where it is defined; 0 if that is not known.
    """

    module: str
    name: str
    kind: str
    arguments: str | None
    bases: tuple[str, ...]
    doc: str
    line: int = 0

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


def parse(module: str, source: str) -> list[Entry]:
    """The public documented entries in a module's source, which is not run.

    Raises:
        UserError: it is not source of this version of Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old docstrings
            return list(_entries(module, ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"is not Python source: {first_line(error)}") from error


def _entries(module: str, tree: ast.Module) -> Iterator[Entry]:
    if doc := prose(ast.get_docstring(tree)):
        yield Entry(module, "", "module", None, (), doc, 1)
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
    name, doc = owner + node.name, prose(ast.get_docstring(node))
    if isinstance(node, ast.ClassDef):
        bases = tuple(ast.unparse(base) for base in node.bases)
        if doc:
            yield Entry(module, name, "class", _constructor(node), bases, doc, node.lineno)
        for member in _definitions(node.body):
            if not isinstance(member, ast.ClassDef):
                yield from _parsed(module, f"{name}.", member)
    elif doc:
        yield Entry(module, name, *_callable(node, method=bool(owner)), (), doc, node.lineno)


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


def prose(doc: str | None) -> str:
    """A docstring; "" for one that is nothing but a test."""
    return "" if doc is None or doc.startswith(">>>") else doc


def documents(entries: list[Entry]) -> Iterator[tuple[Entry, str]]:
    """A text for each module docstring, each function, and each class with its methods.

    Args:
        entries: of one or more modules, those of a class after it.

    Yields:
        The first entry of a text, and the text.
    """
    for _, group in groupby(entries, key=lambda e: (e.module, e.name.split(".")[0])):
        together = list(group)
        yield together[0], "\n\n".join(f"{entry.heading}\n\n{entry.doc}" for entry in together)
