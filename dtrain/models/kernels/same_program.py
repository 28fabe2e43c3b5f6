"""Whether two functions compute the same, read off their code.

Docstrings never count, nor do the names of local variables. What a function names must be the
same too: globals, closures, defaults, decorators, and methods of its class.
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


def same_program(one: Any, other: Any, owners: tuple[type, type] | None = None) -> bool:
    """Whether two functions run the same instructions on equal constants, globals and closures.

    False where that cannot be seen, as for two objects that are equal only in what they hold.

    Args:
        owners: the classes whose methods they are; what they call on themselves is compared too.
    """
    if not (isinstance(one, FunctionType) and isinstance(other, FunctionType)):
        return False
    return _Comparison(owners).functions(one, other)


def runs_its_class(module: nn.Module) -> bool:
    """Whether a call of a module is its class's forward: no hook, no forward of its own."""
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

    def functions(self, one: FunctionType, other: FunctionType) -> bool:
        if (one, other) in self._assumed or (one is other and self._owners is None):
            return True
        self._assumed.add((one, other))
        return (
            self._codes(one.__code__, other.__code__, one, other)
            and self._values(one.__defaults__, other.__defaults__)
            and self._named_values(one.__kwdefaults__ or {}, other.__kwdefaults__ or {})
            and self._cells(one.__closure__ or (), other.__closure__ or ())
        )

    def _codes(self, one: CodeType, other: CodeType, near: FunctionType, far: FunctionType) -> bool:
        """Compare code that runs with the globals of `near` and of `far`."""
        first, second = list(_instructions(one)), list(_instructions(other))
        return (
            _signature(one) == _signature(other)
            and one.co_exceptiontable == other.co_exceptiontable
            and len(first) == len(second)
            and all(self._instructions(a, b, near, far) for a, b in zip(first, second, strict=True))
        )

    def _instructions(
        self, one: tuple[str, Any], other: tuple[str, Any], near: FunctionType, far: FunctionType
    ) -> bool:
        (name, value), (other_name, other_value) = one, other
        if name != other_name:
            return False
        if isinstance(value, CodeType) and isinstance(other_value, CodeType):
            return self._codes(value, other_value, near, far)
        if not self._values(value, other_value):
            return False
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            return self._values(_global(near, value), _global(far, value))
        return name not in _ATTRIBUTES or self._attributes(value)

    def _attributes(self, name: str) -> bool:
        """Compare what the two classes hold under a name; what only instances hold is theirs."""
        if self._owners is None:
            return True
        one, other = (getattr_static(owner, name, _MISSING) for owner in self._owners)
        return self._values(one, other)

    def _values(self, one: Any, other: Any) -> bool:
        if isinstance(one, FunctionType) and isinstance(other, FunctionType):
            return self.functions(one, other)
        if one is other:
            return True
        if type(one) is not type(other):
            return False
        if isinstance(one, tuple):
            pairs = zip(one, other, strict=False)
            return len(one) == len(other) and all(self._values(a, b) for a, b in pairs)
        if isinstance(one, staticmethod | classmethod):
            return self._values(one.__func__, other.__func__)
        # by their text, which distinguishes 0.0 from -0.0
        return isinstance(one, Logger) or (isinstance(one, _LITERALS) and repr(one) == repr(other))

    def _named_values(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one.keys() == other.keys() and all(self._values(one[k], other[k]) for k in one)

    def _cells(self, one: tuple[CellType, ...], other: tuple[CellType, ...]) -> bool:
        return self._values(tuple(map(_content, one)), tuple(map(_content, other)))


def _signature(code: CodeType) -> tuple[Any, ...]:
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return counts, arguments, code.co_flags & _ARGUMENT_FLAGS


def _instructions(code: CodeType) -> Iterator[tuple[str, Any]]:
    """Names and operands of instructions, independent of where constants and names are stored."""
    places, found = dict[int, int](), list[dis.Instruction]()
    for instruction in dis.get_instructions(code):
        places[instruction.offset] = len(found)
        if instruction.opname not in _NOTHING:
            found.append(instruction)
    numbers: dict[str, int] = {}
    for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
        numbers.setdefault(name, len(numbers))
    for instruction in found:
        value = instruction.argval
        if instruction.opcode in _JUMPS:
            value = places.get(value, value)
        elif instruction.opcode in _LOCALS:
            names = value if isinstance(value, tuple) else (value,)
            value = tuple(numbers.get(name, name) for name in names)
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
