"""`dtrain push` and `export`: a finished model for the hub, or for llama.cpp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtrain.cli.arguments import path
from dtrain.core.errors import UserError
from dtrain.core.log import say, warn
from dtrain.core.units import size

if TYPE_CHECKING:
    from dtrain.serving.publish import Result

Address = Annotated[
    Path,
    typer.Argument(
        metavar="RUN|MODEL", parser=path, help="A run folder, or the folder of a merged model."
    ),
]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="A stage (default: the last).")
]


def push(
    address: Address,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository of the hub.")],
    stage: StageName = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The stage's adapter, not its merged model.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private", help="Only its owner can see the repository.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, and list what would be uploaded.")
    ] = False,
) -> None:
    """Upload a merged model or an adapter with its model card to the Hugging Face hub.

    All files are verified before. The token comes from HF_TOKEN or `hf auth login`.
    """
    from dtrain.serving import publish

    publish.check_repo(repo)
    if not dry_run:
        publish.check_token()
    result = publish.find_result(address, stage, adapter=adapter)
    files = publish.uploads(result, repo)
    _verify(result)
    if result.is_adapter and publish.is_local_base(result.folder):
        warn("the adapter's base is a folder of this machine; on the hub its config names none")
    if not result.card:
        warn(f"{result.folder} has no model card (README.md)")
    if dry_run:
        for name, content in files.items():
            print(f"{size(publish.total_bytes([content])):>9}  {name}")
    total = f"{len(files)} files, {size(publish.total_bytes(files.values()))}"
    if dry_run:
        print(f"{total}, to {repo}; nothing was uploaded")
        return
    say(f"uploading {total} to {repo}")
    print(publish.push(files, repo, private=private))


def _verify(result: Result) -> None:
    from dtrain.core.lazy_import import import_fast

    verify_model = import_fast("dtrain.merge.verify").verify_model
    if problems := verify_model(result.folder).problems:
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        fix = "run the recipe again: what is damaged is rebuilt from the last checkpoint"
        raise UserError(f"{problems[0]}{more}", where=str(result.folder), fix=fix)


def export(
    address: Address,
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", parser=path, help="A new file.")],
    stage: StageName = None,
) -> None:
    """Write a merged model as a GGUF file for llama.cpp, by llama.cpp's converter.

    The converter is `convert_hf_to_gguf.py` of the PATH, or the file that DTRAIN_GGUF_CONVERTER
    names. Without one, the command to run elsewhere is printed, and the exit status is 2.
    """
    from dtrain.launching.commands import quote
    from dtrain.serving import gguf, publish

    gguf.check_output(out)
    result = publish.find_result(address, stage)
    if result.is_adapter:
        raise UserError("is an adapter", where=str(address), fix="merge it first: dtrain merge")
    converter = gguf.find_converter(os.environ)
    if converter is None:
        command = gguf.convert_command(["python", gguf.SCRIPT], result.folder, out.absolute())
        print(" ".join(map(quote, command)))
        fix = f"set {gguf.CONVERTER} to the script in a checkout of llama.cpp, or run the above"
        raise UserError("llama.cpp's converter is not installed here", where=gguf.SCRIPT, fix=fix)
    _verify(result)
    gguf.convert(converter, result.folder, out)
    print(out)
