"""Lines of a run's log carry the time of day; a command's own output and tables do not."""

import re

import pytest

from dtrain.core.log import say, warn

TIMED = r"\d\d:\d\d:\d\d "


def test_lines_of_a_rank_carry_the_time(monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    say("stage domain: done")
    warn("no end of turn")
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(TIMED + "stage domain: done", first)
    assert re.fullmatch(TIMED + "warning: no end of turn", second)


@pytest.mark.parametrize(("rank", "text"), [(None, "one line"), ("0", "a table\nof two lines")])
def test_tables_and_commands_print_no_time(rank, text, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    say(text)
    assert capsys.readouterr().out == f"{text}\n"
