"""Quoted names survive bash byte for byte and execute nothing."""

from __future__ import annotations

import random
import subprocess

import pytest

from dtrain.core.errors import UserError
from dtrain.launching.commands import quote, render

VALUES, BATCH = 10_000, 2_500
PIECES = [
    *("'", '"', "`touch x`", "$(touch x)", "${HOME}", "$x", "\n", "\n#SBATCH --time=1\n", "\\"),
    *(";", "&&", "|", ">x", "<", "*", "?", "~", "!", "!!", "{a,b}", "#", " ", "\t", "\r", "=", "%"),
    *("--", "-rf", "-", "é", "漢字", "🏖️", "\u202e", "\x1b[31m", "\x7f", "a", "Z", "0", "/", "."),
    *("EOF\n", "{{ x }}", "{% raw %}", "\udc80"),
]


def values() -> list[str]:
    draw = random.Random(4)
    return ["".join(draw.choices(PIECES, k=draw.randrange(9))) for _ in range(VALUES)]


def test_quoted_values_survive_bash_unchanged(tmp_path):
    drawn = values()
    for start in range(0, VALUES, BATCH):
        batch = drawn[start : start + BATCH]
        # Once as an argument, once by way of a variable that is set.
        lines = (f"x={quote(v)}\nprintf '%s\\0' {quote(v)} \"$x\"\n" for v in batch)
        script = "".join(lines).encode("utf-8", "surrogateescape")
        done = subprocess.run(["bash"], input=script, capture_output=True, cwd=tmp_path, check=True)
        actual = done.stdout.split(b"\0")[:-1]
        expected = [value.encode("utf-8", "surrogateescape") for value in batch]
        assert actual[::2] == expected and actual[1::2] == expected
        assert done.stderr == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_in_container", [False, True])
def test_script_values_are_always_quoted(is_in_container, tmp_path):
    hostile = "a'; touch x #\n#SBATCH --time=1\n$(touch x)"
    script = render(
        "prepare.sh.jinja",
        name="n",
        cores=1,
        memory="1G",
        time="1",
        choices={},
        environment=hostile,
        recipe=hostile,
        shared=hostile,
        mounts=hostile,
        container=hostile if is_in_container else "",
    )
    variable = "DTRAIN_CONTAINER" if is_in_container else "DTRAIN_ENV"
    assert f"{variable}={quote(hostile)}\n" in script
    assert f"-m dtrain data prepare {quote(hostile)}\n" in script
    subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_nul_is_refused():
    with pytest.raises(UserError, match="NUL"):
        quote("a\0b")
