"""Entries of Python sources that are not run."""

from __future__ import annotations

import pytest

from dtrain.core.errors import UserError
from dtrain.extraction.python_code import Entry, parse

SOURCE = '''
"""Module text."""
raise SystemExit("must not run")

if True:
    def wrap(text, width=70, *, end="x", **more):
        """Wrap a text."""

class Box(Base, other.Mixin):
    """A box."""
    def __init__(self, size=1):
        """Not reported."""
    def put(self, thing, /, at=0):
        """Put it in."""
    @staticmethod
    def make(size):
        """Make one."""
    @classmethod
    def of(cls, *things):
        """From things."""
    @property
    def weight(self):
        """How heavy."""
    def _hidden(self):
        """Hidden."""
    def bare(self):
        pass

def tested():
    """>>> tested()"""

def _private():
    """Private."""
'''


def test_entries_of_a_source() -> None:
    parsed = {entry.name: entry for entry in parse("pack.mod", SOURCE)}
    assert set(parsed) == {"", "wrap", "Box", "Box.put", "Box.make", "Box.of", "Box.weight"}
    assert parsed["wrap"].heading == "pack.mod.wrap(text, width=70, *, end='x', **more)"
    assert parsed["Box"].heading == "class pack.mod.Box(size=1)"
    assert parsed["Box"].bases == ("Base", "other.Mixin")
    assert parsed["Box.put"].arguments == "(thing, /, at=0)"
    assert parsed["Box.make"].arguments == "(size)"
    assert parsed["Box.of"].arguments == "(*things)"
    assert (parsed["Box.weight"].kind, parsed["Box.weight"].arguments) == ("property", None)
    assert parsed[""].heading == "module pack.mod"


@pytest.mark.parametrize(
    "source",
    [
        "def f(:\n",
        "print 1\n",
        "a\0b",
        "(" * 900,
        "-" * 200_000 + "1",
        "x = " + "a." * 99_999 + "b",
    ],
)
def test_source_that_cannot_be_parsed_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="is not Python source"):
        parse("m", source)


def test_full_names_are_resolved() -> None:
    assert Entry("builtins", "len", "function", "(obj)", (), "d").full_name == "len"
    assert Entry("json", "", "module", None, (), "d").full_name == "json"
