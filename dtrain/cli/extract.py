"""`dtrain data extract`: training rows from documentation, code and conversations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import address, path
from dtrain.core.cache_paths import store_folder, user_path
from dtrain.core.errors import UserError

if TYPE_CHECKING:
    from dtrain.extraction.text_files import ExtractedRow
    from dtrain.pipeline.extract import Extraction


class Origin(StrEnum):
    """What to make rows of."""

    markdown = "markdown"
    code = "code"
    chats = "chats"


Documents = Annotated[str, typer.Argument(metavar="PATH", parser=address, help="A file or folder.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", parser=path, help="New folder for the rows.")]
From = Annotated[
    Origin,
    typer.Option(
        "--from",
        help="markdown: sections of .md and .rst files. code: signatures and docstrings of "
        ".py files. chats: exported conversations, as JSON, JSON lines or CSV.",
    ),
]
HeldOut = Annotated[float, typer.Option(min=0, max=0.9, help="Share of the documents to hold out.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RULE",
        help="chats: train on what fulfils it: KEY, !KEY, KEY=VALUE or KEY>=NUMBER, a key of "
        "the conversation or of its messages; repeatable.",
    ),
]
Role = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=ROLE",
        help="chats: what a role of the export is: user, assistant, system or skip; repeatable.",
    ),
]
MinTurns = Annotated[
    int, typer.Option(min=1, help="chats: least number of answers in a conversation.")
]


def extract(
    path: Documents,
    out: Out,
    origin: From,
    held_out: HeldOut = 0.1,
    keep: Keep = None,
    role: Role = None,
    min_turns: MinTurns = 1,
) -> None:
    """Make training rows of documentation, Python code or support conversations.

    Writes texts for continued pretraining and questions with answers, each row with its origin,
    and holds out whole documents for evaluation. Duplicates, leaks and faults are removed as by
    `dtrain data clean`; what is left out is counted. Nothing is run or imported.
    """
    from dtrain.pipeline.extract import (
        CONVERSATION_POLICY,
        DOCUMENTATION_POLICY,
        write_extraction,
    )

    if origin is not Origin.chats and (keep or role or min_turns > 1):
        raise UserError(
            "--keep, --role and --min-turns need --from chats", where=f"--from {origin}"
        )
    if out.exists():  # before hours of work
        raise UserError("exists already", where=str(out), fix="choose another folder, or remove it")
    is_chats = origin is Origin.chats
    policy = CONVERSATION_POLICY if is_chats else DOCUMENTATION_POLICY
    rows = _chats(path, role or [], keep or [], min_turns) if is_chats else _files(path, origin)
    _print(write_extraction(out, rows, policy, held_out), out)


def _files(path: str, origin: Origin) -> Callable[[Counter[str]], Iterator[ExtractedRow]]:
    from dtrain.extraction.code import extract_code
    from dtrain.extraction.documentation import extract_documentation

    make = extract_code if origin is Origin.code else extract_documentation
    return lambda left_out: make(user_path(path), left_out)


def _chats(
    path: str, roles: list[str], keep: list[str], min_turns: int
) -> Callable[[Counter[str]], Iterator[ExtractedRow]]:
    from dtrain.pipeline.extract import CONVERSATION_ROLES, extract_chats

    given = dict[str, str]()
    for option in roles:
        name, _, known = option.rpartition("=")
        if known not in CONVERSATION_ROLES or not name:
            fix = f"NAME=ROLE, where ROLE is one of {', '.join(CONVERSATION_ROLES)}"
            raise UserError("is not a role", where=f"--role {option}", fix=fix)
        given[name] = known
    return lambda left_out: extract_chats(path, given, keep, min_turns, store_folder(), left_out)


def _print(result: Extraction, out: Path) -> None:
    from dtrain.pipeline.extract import LEFT_OUT_FILE, recipe_lines

    documents = ", ".join(f"{number:,} {split}" for split, number in result.documents.items())
    print(f"documents: {documents}")
    for name, number in result.rows.items():
        print(f"{number:>9,} rows  {out / name}")
    if result.left_out:
        print(f"left out, or changed (rows: {out / LEFT_OUT_FILE}):")
        for reason, number in sorted(result.left_out.items(), key=lambda item: -item[1]):
            print(f"{number:>9,} {reason}")
    print("for a recipe:")
    for line in recipe_lines(out, result.rows):
        print(f"  {line}")
