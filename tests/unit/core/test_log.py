"""Lines of a run's log carry the time of day; a command's own output and tables do not."""

from __future__ import annotations

import re
import threading
from contextlib import suppress

import pytest

from dtrain.core import log
from dtrain.core.log import progress, say, warn

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


def test_threads_advance_one_after_another(monkeypatch, capsys) -> None:
    both = threading.Barrier(2)

    class Slow(int):
        """Adds itself when another thread adds at the same time, or soon if none can."""

        def __radd__(self, other: int) -> int:
            with suppress(threading.BrokenBarrierError):
                both.wait(0.2)
            return other + int(self)

    monkeypatch.setattr(log, "LINE_EVERY_SECONDS", 0.0)
    with progress("merge", 2) as meter:
        threads = [threading.Thread(target=meter.advance, args=(Slow(1),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meter.done == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["1/2,", "2/2,"]
