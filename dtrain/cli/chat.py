"""`dtrain chat`, `generate` and `serve`: text from models and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import path
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError
from dtrain.core.log import say

if TYPE_CHECKING:
    from dtrain.serving.generator import TextGenerator
    from dtrain.serving.run_models import ServedModel

Address = Annotated[
    str, typer.Argument(metavar="MODEL|RUN", help="A model, an adapter's folder, or a run folder.")
]
AdapterName = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="A stage, `base` or a folder (default: last).",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]


def chat(address: Address, adapter: AdapterName = None, max_new_tokens: MaxNewTokens = 512) -> None:
    """Chat with a model, and switch its adapters; /help lists the commands."""
    from dtrain.serving.chat import Chat, typed

    choices, name = _chosen(address, adapter)
    speaker = _speaker(address, choices[name])
    Chat(speaker, choices, name, max_new_tokens).run(typed())


def generate(
    address: Address,
    prompts: Annotated[
        Path, typer.Option("--in", metavar="FILE", parser=path, help="Prompts (JSON lines).")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", parser=path, help="Answers (JSON lines)."),
    ],
    adapter: AdapterName = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 8,
    max_new_tokens: MaxNewTokens = 256,
) -> None:
    """Answer a file of prompts by greedy decoding; the same command continues after a stop."""
    from dtrain.serving.generate import Answers, count_prompts
    from dtrain.serving.generate import generate as answer_all

    if out.exists() and prompts.exists() and out.samefile(prompts):
        raise UserError("would be overwritten", where=str(prompts), fix="name another --out")
    choices, name = _chosen(address, adapter)
    total = count_prompts(prompts)
    by = (
        f"{address} {name} {choices[name].fingerprint}".strip() + f", up to {max_new_tokens} tokens"
    )
    answers = Answers.open(out, prompts, by) if out.exists() else None  # before a load of minutes
    if answers is None or answers.done < total:
        speaker = _speaker(address, choices[name])
        answers = answers or Answers.open(out, prompts, by)  # a load that fails leaves no file
        answer_all(speaker, prompts, answers, batch_size, max_new_tokens)
    say(f"{out}: {answers.done} of {total} answered")


def _chosen(address: str, name: str | None) -> tuple[dict[str, ServedModel], str]:
    """What can answer, and the name of what shall."""
    from dtrain.serving.chat import chosen
    from dtrain.serving.run_models import served_models

    choices = served_models(address)
    name = name or list(choices)[-1]
    return choices | {name: chosen(choices, name)}, name


def _speaker(address: str, choice: ServedModel) -> TextGenerator:
    import torch

    from dtrain.config.schema import Model
    from dtrain.serving.generator import TextGenerator
    from dtrain.serving.run_models import is_run, open_run

    path = user_path(address)
    settings = open_run(path).recipe.model if is_run(address) else Model(base=address)
    return TextGenerator(
        choice, settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=path, help="A run folder.")],
) -> None:
    """Print the vLLM commands for the merged model and the adapters, and what vLLM refuses."""
    from dtrain.serving.run_models import open_run
    from dtrain.serving.vllm import script

    print(script(open_run(run)), end="")
