"""The shape of a recipe's base: from its folder, the hub's cache, or the table below."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.planning.shapes import ModelShape, check_not_experts, read_config, shape_of

WHERE = "model.base"


class ModelSizes(NamedTuple):
    """A row of the table, as config.json names them."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None


# So that a plan needs no download: the config.json of each model's hub page, its sizes only.
KNOWN = {
    "dtrain:tiny-llama": ModelSizes("llama", 2, 64, 4, 2, 128, 512),
    "HuggingFaceTB/SmolLM2-135M": ModelSizes("llama", 30, 576, 9, 3, 1536, 49152, True),
    "HuggingFaceTB/SmolLM2-360M": ModelSizes("llama", 32, 960, 15, 5, 2560, 49152, True),
    "HuggingFaceTB/SmolLM2-1.7B": ModelSizes("llama", 24, 2048, 32, 32, 8192, 49152, True),
    "meta-llama/Llama-2-7b": ModelSizes("llama", 32, 4096, 32, 32, 11008, 32000),
    "meta-llama/Llama-2-13b": ModelSizes("llama", 40, 5120, 40, 40, 13824, 32000),
    "meta-llama/Llama-2-70b": ModelSizes("llama", 80, 8192, 64, 8, 28672, 32000),
    "codellama/CodeLlama-34b": ModelSizes("llama", 48, 8192, 64, 8, 22016, 32000),
    "01-ai/Yi-34B": ModelSizes("llama", 60, 7168, 56, 8, 20480, 64000),
    "meta-llama/Meta-Llama-3-8B": ModelSizes("llama", 32, 4096, 32, 8, 14336, 128256),
    "meta-llama/Meta-Llama-3-70B": ModelSizes("llama", 80, 8192, 64, 8, 28672, 128256),
    "meta-llama/Llama-3.1-8B": ModelSizes("llama", 32, 4096, 32, 8, 14336, 128256),
    "meta-llama/Llama-3.1-70B": ModelSizes("llama", 80, 8192, 64, 8, 28672, 128256),
    "meta-llama/Llama-3.1-405B": ModelSizes("llama", 126, 16384, 128, 8, 53248, 128256),
    "meta-llama/Llama-3.2-1B": ModelSizes("llama", 16, 2048, 32, 8, 8192, 128256, True, 64),
    "meta-llama/Llama-3.2-3B": ModelSizes("llama", 28, 3072, 24, 8, 8192, 128256, True, 128),
    "meta-llama/Llama-3.3-70B": ModelSizes("llama", 80, 8192, 64, 8, 28672, 128256),
    "mistralai/Mistral-7B-v0.1": ModelSizes("mistral", 32, 4096, 32, 8, 14336, 32000),
    "mistralai/Mistral-7B-v0.3": ModelSizes("mistral", 32, 4096, 32, 8, 14336, 32768),
    "Qwen/Qwen2.5-0.5B": ModelSizes("qwen2", 24, 896, 14, 2, 4864, 151936, True),
    "Qwen/Qwen2.5-1.5B": ModelSizes("qwen2", 28, 1536, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": ModelSizes("qwen2", 36, 2048, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": ModelSizes("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "Qwen/Qwen2.5-14B": ModelSizes("qwen2", 48, 5120, 40, 8, 13824, 152064),
    "Qwen/Qwen2.5-32B": ModelSizes("qwen2", 64, 5120, 40, 8, 27648, 152064),
    "Qwen/Qwen2.5-72B": ModelSizes("qwen2", 80, 8192, 64, 8, 29568, 152064),
    "Qwen/Qwen3-0.6B": ModelSizes("qwen3", 28, 1024, 16, 8, 3072, 151936, True, 128),
    "Qwen/Qwen3-8B": ModelSizes("qwen3", 36, 4096, 32, 8, 12288, 151936, False, 128),
    "Qwen/Qwen3-14B": ModelSizes("qwen3", 40, 5120, 40, 8, 17408, 151936, False, 128),
    "Qwen/Qwen3-32B": ModelSizes("qwen3", 64, 5120, 64, 8, 25600, 151936, False, 128),
    "google/gemma-7b": ModelSizes("gemma", 28, 3072, 16, 16, 24576, 256000, True, 256),
    "google/gemma-2-9b": ModelSizes("gemma2", 42, 3584, 16, 8, 14336, 256000, True, 256),
    "google/gemma-2-27b": ModelSizes("gemma2", 46, 4608, 32, 16, 36864, 256000, True, 128),
    "microsoft/Phi-3-mini-4k": ModelSizes("phi3", 32, 3072, 32, 32, 8192, 32064),
    "microsoft/Phi-3-medium-4k": ModelSizes("phi3", 40, 5120, 40, 10, 17920, 32064),
    "microsoft/phi-4": ModelSizes("phi3", 40, 5120, 40, 10, 17920, 100352),
}
SUFFIXES = ("-instruct", "-chat", "-hf", "-it", "-base")


def find_shape(base: str) -> tuple[ModelShape, str]:
    """The shape of `model.base`, and where it was read.

    Raises:
        UserError: as `find_config`; its architecture is not known.
    """
    config, source = find_config(base)
    return shape_of(config, source), source


def find_config(base: str) -> tuple[dict[str, Any], str]:
    """What config.json says of `model.base`, and where it was read.

    Raises:
        UserError: there is no config.json of it on this machine, and it is not in the table.
    """
    folder = local_path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no config.json, so it is not a model", where=WHERE)
        return read_config(folder / "config.json"), str(folder / "config.json")
    if cached := _cached_config(base):
        return read_config(cached), str(cached)
    row = known_name(base)
    if row is not None:
        config = {k: v for k, v in KNOWN[row]._asdict().items() if v is not None}
        return config, f"dtrain's table of shapes ({row})"
    if _is_path(base):
        what = f"there is no such folder, so no config.json of {base!r}"
        raise UserError(what, where=WHERE, fix="give a model's folder or a hub id")
    close = get_close_matches(base, KNOWN, n=1)
    hint = f"did you mean {close[0]}? else " if close else ""
    raise UserError(
        f"no config.json of {base!r} on this machine",
        where=WHERE,
        fix=f"{hint}give a folder, or: hf download {base} config.json",
    )


def check_trainable(base: str) -> None:
    """Refuse what no engine trains, as far as this machine knows the base's config.json.

    Raises:
        UserError: it is a mixture of experts.
    """
    try:
        config, source = find_config(base)
    except UserError:  # fetched later, and looked at then
        return
    check_not_experts(config, source)


def known_name(base: str) -> str | None:
    """The row of the table for a hub id; chat and instruct models have the shape of their base."""
    if base == "dtrain:smollm2-135m":
        return "HuggingFaceTB/SmolLM2-135M"
    return _BY_STEM.get(_stem(base))


def _stem(name: str) -> str:
    short = name.lower()
    while (cut := next((s for s in SUFFIXES if short.endswith(s)), None)) is not None:
        short = short.removesuffix(cut)
    return short


_BY_STEM = {_stem(name): name for name in KNOWN}


def _is_path(base: str) -> bool:
    """Whether it can be no hub id."""
    return base.startswith(("/", ".", "~")) or base.count("/") > 1


def _cached_config(base: str) -> Path | None:
    """config.json of a hub id in the hub client's cache; its import would cost half a second."""
    if "/" not in base or _is_path(base):
        return None
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    place = cache.expanduser() / f"models--{base.replace('/', '--')}"
    try:
        commit = (place / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    config = place / "snapshots" / commit / "config.json"
    return config if config.is_file() else None
