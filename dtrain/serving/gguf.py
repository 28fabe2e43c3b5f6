"""A merged model as a GGUF file, by llama.cpp's own converter: it knows each architecture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dtrain.core.errors import UserError

CONVERTER = "DTRAIN_GGUF_CONVERTER"  # variable: path of the script below, in a checkout
SCRIPT = "convert_hf_to_gguf.py"


def find_converter(environ: Mapping[str, str]) -> list[str] | None:
    """The command that starts the converter; None if it is not installed.

    The script of a checkout runs with this Python, which has torch and transformers; an installed
    program brings its own.

    Raises:
        UserError: the variable names no file.
    """
    if named := environ.get(CONVERTER):
        if not Path(named).is_file():
            fix = f"the path of llama.cpp's {SCRIPT}"
            raise UserError("there is no such file", where=f"{CONVERTER}={named}", fix=fix)
        return [sys.executable, named]
    installed = shutil.which(SCRIPT, path=environ.get("PATH"))
    return [installed] if installed else None


def convert_command(converter: list[str], model: Path, out: Path) -> list[str]:
    """The command that converts a model; `auto` keeps 16-bit weights as they are."""
    return [*converter, str(model.absolute()), "--outfile", str(out), "--outtype", "auto"]


def check_output(out: Path) -> None:
    """Check that a file can be written.

    Raises:
        UserError: it exists, its folder does not, or it is not called so.
    """
    if out.suffix != ".gguf":
        raise UserError("does not end with .gguf", where=str(out), fix=f"{out}.gguf")
    if out.exists():
        raise UserError("exists already", where=str(out), fix="choose another file")
    if not out.absolute().parent.is_dir():
        raise UserError("there is no such folder", where=str(out.parent), fix="create it")


def convert(converter: list[str], model: Path, out: Path) -> None:
    """Run the converter; the file appears complete or not at all.

    Raises:
        UserError: the converter fails; it has printed why.
    """
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.gguf")
    try:
        status = subprocess.run(convert_command(converter, model, partial), check=False).returncode
        if status or not partial.is_file():
            message = f"llama.cpp's converter ended with status {status}"
            fix = "its messages are above; it may lack a Python package, or the architecture"
            raise UserError(message, where=str(model), fix=fix)
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"cannot be run: {error.strerror}", where=converter[-1]) from error
    finally:
        partial.unlink(missing_ok=True)
