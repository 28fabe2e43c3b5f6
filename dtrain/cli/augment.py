"""`dtrain data augment`: more rows, written by a model behind an OpenAI-style endpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.core.errors import UserError

if TYPE_CHECKING:
    from dtrain.augmentation.budget import Limits
    from dtrain.config.schema import Source

Bound = typer.Option(min=1, help="Of all runs into this folder together; no bound if not given.")


class How(StrEnum):
    """What is made."""

    rewrite = "rewrite"
    answers = "answers"
    backtranslate = "backtranslate"


def augment(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file or folder of rows.")],
    how: Annotated[
        How,
        typer.Option(
            help="rewrite: each instruction in other words. answers: other answers to it. "
            "backtranslate: an instruction for each text or answer."
        ),
    ],
    endpoint: Annotated[str, typer.Option(metavar="URL", help="Such as http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Its name there.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Made, or gone on with.")],
    copies: Annotated[int, typer.Option(min=1, help="Replies to each row.")] = 1,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=OWN", help="Such as instruction=question; repeat."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    most_requests: Annotated[int | None, Bound] = None,
    most_tokens: Annotated[int | None, Bound] = None,
    most_cost: Annotated[float | None, typer.Option(min=0, help="Needs --prices.")] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Of a million tokens, in any currency.")
    ] = None,
    per_minute: Annotated[float | None, typer.Option(min=0.01, help="Requests begun.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 8,
    reply_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of the model.")] = 0.8,
) -> None:
    """Make more rows of those there are; the same command goes on where it was stopped.

    The key of the endpoint is taken from OPENAI_API_KEY. Replies that are empty, cut off, refuse,
    or repeat a row of the source or each other, are set apart with the reason.
    """
    limits = _limits(most_requests, most_tokens, most_cost, prices, per_minute)
    try:
        from dtrain.augmentation.augment import MADE, REFUSED, Task
        from dtrain.augmentation.augment import augment as make
        from dtrain.augmentation.endpoint import Endpoint
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise UserError("needs openai", fix="pip install 'dtrain[augment]'") from error
    from dtrain.data_quality.scan import source_input

    asked = Endpoint(endpoint, model, reply_tokens, temperature)
    task = Task(source_input(_source(path, columns or [])), how.value, copies, at_once, rows)
    told = make(task, asked, limits, out)
    _print(told, prices is not None)
    print(f"made: {out / MADE}; refused, and why: {out / REFUSED}")


def _source(path: str, columns: list[str]) -> Source:
    from typing import get_args

    from dtrain.config.schema import Column, Source

    names: dict[Column, str] = {}
    for given in columns:
        name, _, own = given.partition("=")
        known = next((column for column in get_args(Column) if column == name), None)
        if known is None or not own:
            fix = f"NAME=OWN, where NAME is one of {', '.join(get_args(Column))}"
            raise UserError("no column of a format", where=f"--column {given}", fix=fix)
        names[known] = own
    return Source(path=path, columns=names)


def _limits(
    requests: int | None,
    tokens: int | None,
    cost: float | None,
    prices: str | None,
    per_minute: float | None,
) -> Limits:
    from dtrain.augmentation.budget import Limits

    if cost is not None and prices is None:
        raise UserError("--most-cost needs --prices", fix="--prices IN,OUT of a million tokens")
    parts = (prices or "0,0").split(",")
    try:
        of_in, of_out = (float(part) for part in parts)
        good = 0 <= of_in < float("inf") and 0 <= of_out < float("inf")
    except ValueError:
        good = False
    if not good:
        raise UserError(
            "two numbers are wanted", where=f"--prices {prices}", fix="such as 0.15,0.6"
        )
    return Limits(requests, tokens, cost, (of_in, of_out), per_minute)


def _print(told: dict[str, Any], priced: bool) -> None:
    for name, number in told["counts"].items():
        print(f"{name:16} {number:>10,}")
    spent = told["spent"]
    cost = f", cost {told['cost']:,.4f}" if priced else ""
    print(f"{spent['requests']:,} requests, {spent['tokens_in']:,} tokens in, ", end="")
    print(f"{spent['tokens_out']:,} out{cost}")
    if told["limit_reached"]:
        print("a limit was reached: raise it, and the same command goes on")
    if told["failed"]:
        print(f"{told['failed']:,} requests failed; the same command asks again. The last:")
        print(*(f"    {note}" for note in told["failures"]), sep="\n")
