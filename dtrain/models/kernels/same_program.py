"""Compares the bytecode of two functions.

Docstrings and names of local variables do not count. Everything else that a function refers to must
be equal: globals, closures, defaults, decorators, and methods of its class.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from inspect import getattr_static
from logging import Logger
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

_MISSING = object()
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_LOCALS = frozenset((*dis.haslocal, *dis.hasfree))
_NOTHING = frozenset({"EXTENDED_ARG", "NOP"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_ARGUMENT_FLAGS = 0x04 | 0x08 | 0x20 | 0x80 | 0x100 | 0x200  # *args, **kwargs, generators, async
_LITERALS = (int, float, complex, str, bytes, bool, type(None), type(...), tuple, frozenset)


def same_program(left: Any, right: Any, owners: tuple[type, type] | None = None) -> bool:
    """Whether two functions run the same instructions on equal constants, globals and closures.

    False where that cannot be decided, as for two objects of equal content.

    Args:
        owners: the classes that define the two methods; attributes of `self` are compared too.
    """
    if not (isinstance(left, FunctionType) and isinstance(right, FunctionType)):
        return False
    return _Comparison(owners).functions(left, right)


def runs_its_class(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward: no hooks, no replaced forward."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    usual_call = type(module).__call__ is nn.Module.__call__
    return usual_call and "forward" not in vars(module) and not any(hooks)


class _Comparison:
    def __init__(self, owners: tuple[type, type] | None) -> None:
        self._owners = owners if owners is not None and owners[0] is not owners[1] else None
        self._assumed: set[tuple[FunctionType, FunctionType]] = set()  # recursion ends here

    def functions(self, left: FunctionType, right: FunctionType) -> bool:
        if (left, right) in self._assumed or (left is right and self._owners is None):
            return True
        self._assumed.add((left, right))
        return (
            self._codes(left.__code__, right.__code__, left, right)
            and self._values(left.__defaults__, right.__defaults__)
            and self._named_values(left.__kwdefaults__ or {}, right.__kwdefaults__ or {})
            and self._cells(left.__closure__ or (), right.__closure__ or ())
        )

    def _codes(
        self, left: CodeType, right: CodeType, near: FunctionType, far: FunctionType
    ) -> bool:
        """Compare code that runs with the globals of `near` and of `far`."""
        first, second = list(_instructions(left)), list(_instructions(right))
        return (
            _signature(left) == _signature(right)
            and left.co_exceptiontable == right.co_exceptiontable
            and len(first) == len(second)
            and all(self._instructions(a, b, near, far) for a, b in zip(first, second, strict=True))
        )

    def _instructions(
        self, left: tuple[str, Any], right: tuple[str, Any], near: FunctionType, far: FunctionType
    ) -> bool:
        (name, value), (right_name, right_value) = left, right
        if name != right_name:
            return False
        if isinstance(value, CodeType) and isinstance(right_value, CodeType):
            return self._codes(value, right_value, near, far)
        if not self._values(value, right_value):
            return False
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self._values(_global(near, value), _global(far, value))
        return name not in _ATTRIBUTES or self._attributes(value)

    def _attributes(self, name: str) -> bool:
        """Compare the two classes' attribute of this name; attributes of instances do not count."""
        if self._owners is None:
            return True
        left, right = (getattr_static(owner, name, _MISSING) for owner in self._owners)
        return self._values(left, right)

    def _values(self, left: Any, right: Any) -> bool:
        if isinstance(left, FunctionType) and isinstance(right, FunctionType):
            return self.functions(left, right)
        if left is right:
            return True
        if type(left) is not type(right):
            return False
        if isinstance(left, tuple):
            pairs = zip(left, right, strict=False)
            return len(left) == len(right) and all(self._values(a, b) for a, b in pairs)
        if isinstance(left, staticmethod | classmethod):
            return self._values(left.__func__, right.__func__)
        if isinstance(left, Logger):
            return True
        # by their text, which distinguishes 0.0 from -0.0
        return isinstance(left, _LITERALS) and repr(left) == repr(right)

    def _named_values(self, left: dict[str, Any], right: dict[str, Any]) -> bool:
        return left.keys() == right.keys() and all(self._values(left[k], right[k]) for k in left)

    def _cells(self, left: tuple[CellType, ...], right: tuple[CellType, ...]) -> bool:
        return self._values(tuple(map(_content, left)), tuple(map(_content, right)))


def _signature(code: CodeType) -> tuple[Any, ...]:
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return counts, arguments, code.co_flags & _ARGUMENT_FLAGS


def _instructions(code: CodeType) -> Iterator[tuple[str, Any]]:
    """Names and operands of instructions, independent of where constants and names are stored."""
    positions, instructions = dict[int, int](), list[dis.Instruction]()
    for instruction in dis.get_instructions(code):
        positions[instruction.offset] = len(instructions)
        if instruction.opname not in _NOTHING:
            instructions.append(instruction)
    slots: dict[str, int] = {}
    for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        slots.setdefault(name, len(slots))
    for instruction in instructions:
        value = instruction.argval
        if instruction.opcode in _JUMPS:
            value = positions.get(value, value)
        elif instruction.opcode in _LOCALS:
            names = value if isinstance(value, tuple) else (value,)
            value = tuple(slots.get(name, name) for name in names)
        yield instruction.opname, value


def _global(function: FunctionType, name: str) -> Any:
    names = function.__globals__
    builtins = names.get("__builtins__", {})
    builtins = builtins if isinstance(builtins, dict) else vars(builtins)
    return names.get(name, builtins.get(name, _MISSING))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING
