"""The config.json of a recipe's base: from its folder, the hub's cache, or a table of sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.config.data import Data
from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import SAMPLE_PREFIX, hub_id, hub_snapshot, local_path
from dtrain.core.errors import UserError
from dtrain.core.weight_files import undownloaded
from dtrain.planning.architectures import (
    ARCHITECTURES,
    check_not_quantized,
    read_config,
    shape_of,
)
from dtrain.planning.built_shape import build_shape
from dtrain.planning.shapes import ModelShape

WHERE = "model.base"


class ModelSizes(NamedTuple):
    """The sizes of a model, named as in config.json; `more` has those of its kind alone."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    more: tuple[tuple[str, Any], ...] = ()


def _experts(**sizes: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(sizes.items())


# Sizes from the config.json of each model's hub page, so that a plan needs no download.
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
    "Qwen/Qwen3-30B-A3B": ModelSizes(
        "qwen3_moe",
        48,
        2048,
        32,
        4,
        6144,
        151936,
        False,
        128,
        _experts(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
    ),
    "Qwen/Qwen3-235B-A22B": ModelSizes(
        "qwen3_moe",
        94,
        4096,
        64,
        4,
        12288,
        151936,
        False,
        128,
        _experts(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536),
    ),
    "Qwen/Qwen3.5-35B-A3B": ModelSizes(
        "qwen3_5_moe_text",
        40,
        2048,
        16,
        2,
        512,
        248320,
        False,
        256,
        _experts(num_experts=256, num_experts_per_tok=8, moe_intermediate_size=512),
    ),
    "mistralai/Mixtral-8x7B-v0.1": ModelSizes(
        "mixtral",
        32,
        4096,
        32,
        8,
        14336,
        32000,
        False,
        None,
        _experts(num_local_experts=8, num_experts_per_tok=2),
    ),
    "openai/gpt-oss-20b": ModelSizes(
        "gpt_oss",
        24,
        2880,
        64,
        8,
        2880,
        201088,
        False,
        64,
        _experts(num_local_experts=32, num_experts_per_tok=4),
    ),
    "openai/gpt-oss-120b": ModelSizes(
        "gpt_oss",
        36,
        2880,
        64,
        8,
        2880,
        201088,
        False,
        64,
        _experts(num_local_experts=128, num_experts_per_tok=4),
    ),
    "zai-org/GLM-4.5-Air": ModelSizes(
        "glm4_moe",
        46,
        4096,
        96,
        8,
        10944,
        151552,
        False,
        128,
        _experts(
            n_routed_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1408,
            n_shared_experts=1,
            first_k_dense_replace=1,
            attention_bias=True,
        ),
    ),
}
# max_position_embeddings from the same pages, by the beginning of the name; the longest counts.
# Where a chat model has fewer, they are the base model's.
POSITIONS = {
    "HuggingFaceTB/SmolLM2": 8192,
    "meta-llama/Llama-2": 4096,
    "codellama/": 16384,
    "01-ai/Yi-34B": 4096,
    "meta-llama/Meta-Llama-3": 8192,
    "meta-llama/Llama-3.": 131_072,
    "mistralai/Mistral-7B": 32768,
    "Qwen/Qwen2.5": 131_072,
    "Qwen/Qwen2.5-0.5B": 32768,
    "Qwen/Qwen2.5-3B": 32768,
    "Qwen/Qwen3": 40960,
    "Qwen/Qwen3.5": 262_144,
    "google/gemma": 8192,
    "microsoft/Phi-3": 4096,
    "microsoft/phi-4": 16384,
    "mistralai/Mixtral": 32768,
    "openai/gpt-oss": 131_072,
    "zai-org/GLM-4.5": 131_072,
}
SUFFIXES = ("-instruct", "-chat", "-hf", "-it", "-base")


def find_shape(base: str, where: str = WHERE) -> tuple[ModelShape, str]:
    """The shape of a model, and the source that it was read from.

    Args:
        base: folder or hub id.
        where: key of the recipe, for errors.

    An architecture that the plan does not compute is built by a child process, in seconds.

    Raises:
        UserError: `find_config` finds no config, or no model can be built from it.
    """
    config, source = find_config(base, where)
    known = config.get("model_type") in ARCHITECTURES
    return (shape_of if known else build_shape)(config, source), source


def find_config(base: str, where: str = WHERE) -> tuple[dict[str, Any], str]:
    """The config.json of a model, and the source that it was read from.

    Args:
        base: folder or hub id.
        where: key of the recipe, for errors.

    Raises:
        UserError: this machine has no config.json of the base, and the table no row.
    """
    folder = local_path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json, so it is not a model", where=where)
        return read_config(folder / "config.json"), str(folder / "config.json")
    if cached := _cached_config(base):
        return read_config(cached), str(cached)
    row = known_name(base)
    if row is not None:
        sizes = KNOWN[row]
        named = {k: v for k, v in sizes._asdict().items() if v is not None and k != "more"}
        config = named | dict(sizes.more)
        if prefixes := [prefix for prefix in POSITIONS if row.startswith(prefix)]:
            config["max_position_embeddings"] = POSITIONS[max(prefixes, key=len)]
        return config, f"dtrain's table of shapes ({row})"
    if not hub_id(base):
        raise UserError(
            f"there is no such folder, so no config.json of {base!r}",
            where=where,
            fix="use the folder of a model, or a hub id",
        )
    close = get_close_matches(base, KNOWN, n=1)
    hint = f"did you mean {close[0]}? If not, " if close else ""
    if "/" not in base:  # hub ids have an owner, but for a few old ones
        hint += f"write {SAMPLE_PREFIX}{base} for a sample, "
    raise UserError(
        f"no config.json of {base!r} on this machine",
        where=where,
        fix=f"{hint}use a folder, or run: {fetch_command(base)}",
    )


def fetch_command(base: str, revision: str | None = None) -> str:
    """The command that downloads a base from the hub."""
    return f"dtrain model fetch {base}" + (f" --revision {revision}" if revision else "")


def check_downloaded(recipe: Recipe, override: str) -> None:
    """Check that every hub model of a recipe is on this machine, as nodes may have no internet.

    Args:
        override: what a person adds to let the job download them.

    Raises:
        UserError: one is not, or not whole.
    """
    for key, address, revision in recipe.models:
        if problem := undownloaded(address, revision):
            fix = f"{fetch_command(address, revision)}; or {override}, if the nodes reach the hub"
            raise UserError(problem, where=key, fix=fix)


def check_trainable(base: str) -> None:
    """Check that dtrain can train the base, if this machine has its config.json.

    Raises:
        UserError: the base is quantized.
    """
    try:
        config, source = find_config(base)
    except UserError:  # the run downloads the base and checks it then
        return
    check_not_quantized(config, source)


def known_name(base: str) -> str | None:
    """The table's row for a hub id; chat and instruct models have the sizes of their base."""
    if base == "dtrain:smollm2-135m":
        return "HuggingFaceTB/SmolLM2-135M"
    return _BY_STEM.get(_stem(base))


def _stem(name: str) -> str:
    short = name.lower()
    while (cut := next((s for s in SUFFIXES if short.endswith(s)), None)) is not None:
        short = short.removesuffix(cut)
    return short


_BY_STEM = {_stem(name): name for name in KNOWN}


def _cached_config(base: str) -> Path | None:
    """config.json in the hub client's cache."""
    snapshot = hub_snapshot(base) if hub_id(base) else None
    config = snapshot / "config.json" if snapshot else None
    return config if config and config.is_file() else None


POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
MAX_FACTOR = 1e6  # of positions
ROPE_KEYS = ("rope_parameters", "rope_scaling")


def trained_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that a model was trained on, or that its scaled RoPE reaches; None if unknown.

    Args:
        config: content of config.json; of a multimodal model, the text model's part counts.
    """
    text = config.get("text_config") or config
    unscaled = next((text[key] for key in POSITION_KEYS if isinstance(text.get(key), int)), None)
    if unscaled is None:
        return None
    scaled = [factor * (original or unscaled) for factor, original in _rope_scalings(text)]
    return int(max(unscaled, *scaled, 0))


def _rope_scalings(config: Mapping[str, Any]) -> Iterator[tuple[float, int | None]]:
    """Factor and original length of each scaled RoPE; some models have one per layer type."""
    for rope in (config.get(key) for key in ROPE_KEYS):
        if not isinstance(rope, Mapping):
            continue
        for scaling in (rope, *(x for x in rope.values() if isinstance(x, Mapping))):
            factor = scaling.get("factor")
            original = scaling.get("original_max_position_embeddings")
            if isinstance(factor, int | float) and 0 < factor < MAX_FACTOR:
                yield float(factor), original if isinstance(original, int) else None


def position_warnings(recipe: Recipe) -> list[str]:
    """Warnings about sequences longer than the base's positions, before any data are read.

    Documents packed into such a sequence may be shorter; only prepared data show their lengths.
    """
    try:
        config, source = find_config(recipe.model.base)
    except UserError:  # the run downloads the base and checks it then
        return []
    known = trained_positions(config)
    groups: dict[str, Data] = {f"stages.{s.name}.data": s.data for s in recipe.stages}
    groups |= {f"evaluation.sets.{name}": data for name, data in recipe.evaluation.sets.items()}
    return [
        f"{key}: sequence_length is {data.sequence_length}, but the model has {known} positions "
        f"({source}); longer documents exceed them"
        for key, data in groups.items()
        if known is not None and data.sequence_length > known
    ]
