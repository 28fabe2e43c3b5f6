"""Every command's help has examples that parse; versions and completion answer without torch."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import typer
import typer.testing

from dtrain.cli.examples import EXAMPLES
from dtrain.cli.root import app

ROOT = typer.main.get_command(app)


def commands(
    command: click.Command = ROOT, words: tuple[str, ...] = ()
) -> dict[str, click.Command]:
    """Every command that can be typed, by its words."""
    found = {} if not words else {" ".join(words): command}
    for name, inner in getattr(command, "commands", {}).items():
        found |= commands(inner, (*words, name))
    is_plain_group = hasattr(command, "commands") and not command.invoke_without_command
    return {k: v for k, v in found.items() if not (is_plain_group and k == " ".join(words))}


def test_help_has_no_line_breaks_of_the_source() -> None:
    for name, command in commands().items():
        paragraphs = (command.help or "").split("\n\n")
        assert not any("\n" in paragraph for paragraph in paragraphs), name


def test_every_command_has_an_example() -> None:
    assert set(EXAMPLES) == set(commands())
    for name, command in commands().items():
        assert command.epilog, name
        assert all(example in command.epilog for example in EXAMPLES[name])


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_parses(example: str) -> None:
    program, *arguments = shlex.split(example.partition(" > ")[0])
    assert program == "dtrain"
    command, context = ROOT, None
    while hasattr(command, "commands") and arguments and arguments[0] in command.commands:
        command = command.commands[arguments.pop(0)]
    if hasattr(command, "commands"):
        assert not arguments
        return
    context = command.make_context(example, arguments)  # raises for an option that does not exist
    assert not context.args


def dtrain(*arguments: str, **environment: str) -> str:
    """What `dtrain` prints; an import of torch would take seconds and fails here."""
    code = "import sys; sys.modules['torch'] = None; from dtrain.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80", "TERM": "dumb", "SHELL": "/bin/bash"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_version_names_python_and_torch() -> None:
    head, python, torch = dtrain("--version").strip().split(", ")
    assert re.fullmatch(r"dtrain \d+\.\d+\S*(?: \(commit \w{12}\))?", head)
    assert python == "Python " + ".".join(map(str, sys.version_info[:3]))
    assert torch == f"torch {version('torch')}"


def complete(line: str, folder: Path) -> list[str]:
    words = line.split(" ")
    variables = {
        "_DTRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = (
        f"import os; os.chdir({str(folder)!r}); import sys; sys.argv[0] = 'dtrain'; "
        "sys.modules['torch'] = None; from dtrain.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables
    )
    return done.stdout.split()


def test_the_shell_completes_recipes_and_keys(tmp_path) -> None:
    (tmp_path / "7b-mine.yaml").write_text("")
    (tmp_path / "7b-notes.txt").write_text("")
    assert complete("dtrain run 7b-", tmp_path) == ["7b-lora", "7b-qlora", "7b-mine.yaml"]
    keys = complete("dtrain plan 7b-lora stages.task.train.checkpoint", tmp_path)
    assert keys == ["stages.task.train.checkpoint_every_steps="]
    assert complete("dtrain recipes copy 13b", tmp_path) == ["13b-lora", "13b-qlora"]
    assert "complete_bash" in dtrain("--show-completion")


@pytest.mark.parametrize("name", ["", *commands()])
def test_no_help_is_wider_than_80_columns_or_cuts_a_word(name: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    text = typer.testing.CliRunner().invoke(app, [*name.split(), "--help"]).output
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\w… ", text.replace("step-… ", ""))
