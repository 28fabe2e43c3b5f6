"""Reading documentation out of sources without running them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.samples import stdlib
from dtrain.samples.stdlib import entries, inspected, module_files


def test_private_and_test_modules_are_skipped(tmp_path: Path) -> None:
    for name in ("a.py", "_b.py", "this.py", "p/__init__.py", "p/c.py", "p/test/d.py", "q/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "p/test/__init__.py").write_text("")
    assert [name for name, _ in module_files(tmp_path)] == ["a", "p", "p.c"]


def test_modules_in_c_are_inspected() -> None:
    math_entries = {entry.name: entry for entry in inspected("math")}
    assert math_entries["isqrt"].arguments == "(n, /)"
    assert list(inspected("no_such_module")) == []
    methods = {entry.full_name: entry for entry in inspected("builtins")}
    assert methods["str.upper"].arguments == "()"
    assert methods["bytes.partition"].arguments == "(sep, /)"


def test_standard_library_is_read() -> None:
    library = entries()
    assert library == sorted(library, key=lambda e: (e.module, e.name))
    by_name = {entry.full_name: entry for entry in library}
    assert by_name["textwrap.wrap"].arguments == "(text, width=70, **kwargs)"
    assert by_name["json.decoder.JSONDecodeError"].bases == ("ValueError",)
    assert len(library) > 3000
    assert not any(" at 0x" in (entry.arguments or "") for entry in library)


def test_unreadable_signatures_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise AttributeError("EPOLLIN")  # select.epoll.register under Python 3.13

    monkeypatch.setattr(stdlib.inspect, "signature", fail)
    assert {entry.arguments for entry in inspected("select")} == {None}
