"""`dtrain data augment`: generate more rows with a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dtrain.cli.arguments import address, path
from dtrain.core.errors import UserError

if TYPE_CHECKING:
    from dtrain.config.data import Source

Limit = typer.Option(min=1, help="Over all runs into this folder; default: no limit.")


class AugmentationMode(StrEnum):
    """What to generate for each row."""

    rewrite = "rewrite"
    answers = "answers"
    backtranslate = "backtranslate"


Rows = Annotated[
    str, typer.Argument(metavar="PATH", parser=address, help="A file or folder of rows.")
]
Mode = Annotated[
    AugmentationMode,
    typer.Option(
        help="rewrite: each instruction in other words. answers: other answers to it. "
        "backtranslate: an instruction for each text or answer."
    ),
]
EndpointUrl = Annotated[
    str, typer.Option(metavar="URL", help="For example http://localhost:8000/v1.")
]
ModelName = Annotated[str, typer.Option(help="The model's name on the server.")]
Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", parser=path, help="Output folder; an existing one is continued."
    ),
]
Copies = Annotated[int, typer.Option(min=1, help="Replies to each row.")]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=COLUMN",
        help="Column of the file for a column of the format, such as instruction=question; "
        "repeatable.",
    ),
]
FirstRows = Annotated[
    int | None, typer.Option(min=1, help="Use only this many rows from the start.")
]
MaxRequests = Annotated[int | None, Limit]
MaxTokens = Annotated[int | None, Limit]
MaxCost = Annotated[
    float | None, typer.Option(min=0, help="As above, in the currency of --prices.")
]
Prices = Annotated[
    str | None,
    typer.Option(metavar="IN,OUT", help="Price of a million prompt and completion tokens."),
]
PerMinute = Annotated[float | None, typer.Option(min=0.01, help="Requests started per minute.")]
AtOnce = Annotated[int, typer.Option(min=1, help="Maximum number of pending requests.")]
ReplyTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens of a reply.")]
Temperature = Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature.")]


def augment(
    path: Rows,
    how: Mode,
    endpoint: EndpointUrl,
    model: ModelName,
    out: Out,
    copies: Copies = 1,
    columns: Columns = None,
    rows: FirstRows = None,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    max_cost: MaxCost = None,
    prices: Prices = None,
    per_minute: PerMinute = None,
    at_once: AtOnce = 8,
    reply_tokens: ReplyTokens = 1024,
    temperature: Temperature = 0.8,
) -> None:
    """Generate more rows from existing ones; the same command continues after an interruption.

    The endpoint's key comes from OPENAI_API_KEY. Replies that are empty, cut off, refusals, or
    repeat a row of the source or another reply are written to a separate file with the reason.
    """
    price_in, price_out = _parse_prices(prices, max_cost)
    try:
        from dtrain.augmentation.augment import (
            GENERATED_FILE,
            REJECTED_FILE,
            AugmentationTask,
        )
        from dtrain.augmentation.augment import augment as generate
        from dtrain.augmentation.endpoint import Endpoint
        from dtrain.augmentation.request_pool import SpendingLimits
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise UserError("needs openai", fix="pip install 'dtrain[augment]'") from error
    from dtrain.data.records import open_source

    limits = SpendingLimits(max_requests, max_tokens, max_cost, (price_in, price_out), per_minute)
    client = Endpoint(endpoint, model, reply_tokens, temperature)
    source = open_source(_source(path, columns or []))
    task = AugmentationTask(source, how.value, copies, at_once, rows)
    summary = generate(task, client, limits, out)
    _print_summary(summary, prices is not None)
    print(f"rows: {out / GENERATED_FILE}; rejected replies, with reasons: {out / REJECTED_FILE}")


def _source(path: str, options: list[str]) -> Source:
    from typing import get_args

    from dtrain.config.data import Source
    from dtrain.config.objectives import Column

    columns: dict[Column, str] = {}
    for option in options:
        name, _, file_column = option.partition("=")
        column = next((column for column in get_args(Column) if column == name), None)
        if column is None or not file_column:
            fix = f"NAME=COLUMN, where NAME is one of {', '.join(get_args(Column))}"
            raise UserError("not a column of a format", where=f"--column {option}", fix=fix)
        columns[column] = file_column
    return Source(path=path, columns=columns)


def _parse_prices(prices: str | None, cost: float | None) -> tuple[float, float]:
    if cost is not None and prices is None:
        fix = "add --prices IN,OUT, the prices of a million tokens"
        raise UserError("--max-cost needs --prices", fix=fix)
    try:
        price_in, price_out = (float(price) for price in (prices or "0,0").split(","))
        valid = 0 <= price_in < float("inf") and 0 <= price_out < float("inf")
    except ValueError:
        valid = False
    if not valid:
        fix = "two numbers, such as 0.15,0.6"
        raise UserError("not two prices", where=f"--prices {prices}", fix=fix)
    return price_in, price_out


def _print_summary(summary: dict[str, Any], has_prices: bool) -> None:
    for name, count in summary["counts"].items():
        print(f"{name:16} {count:>10,}")
    spent = summary["spent"]
    cost = f", cost {summary['cost']:,.4f}" if has_prices else ""
    print(f"{spent['requests']:,} requests, {spent['tokens_in']:,} tokens in, ", end="")
    print(f"{spent['tokens_out']:,} out{cost}")
    if summary["limit_reached"]:
        print("a limit was reached: raise it and run the same command to continue")
    if summary["failed"]:
        print(f"{summary['failed']:,} requests failed; the same command repeats them. The last:")
        print(*(f"    {note}" for note in summary["failures"]), sep="\n")
