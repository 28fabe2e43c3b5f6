"""Which parameters train: LoRA and its relatives, a part of the base, or all of it."""

from __future__ import annotations

import re
from math import sqrt
from typing import Any

from dtrain.core.errors import UserError
from dtrain.importing.foreign_config import ForeignConfig

METHOD = "stages[].method."
KIND_KEYS = ("adapter", "finetuning_type", "use_peft")
FOUR_BITS = ("load_in_4bit", "quantization_bit")
DORA = ("peft_use_dora", "use_dora")
RSLORA = ("peft_use_rslora", "use_rslora")
RANK, ALPHA, DROPOUT = ("lora_r", "lora_rank"), ("lora_alpha",), ("lora_dropout",)
TARGETS = ("lora_target_linear", "lora_target", "lora_target_modules")


def method(config: ForeignConfig, kind: str, defaults: dict[str, Any]) -> None:
    """Set the stage's method.

    Args:
        kind: lora, qlora, freeze or full.
        defaults: the tool's rank, alpha and dropout, which `method` of dtrain names so.

    Raises:
        UserError: dtrain has no such method.
    """
    if kind == "full":
        config.put(METHOD + "kind", "full", *KIND_KEYS)
        lora = [key for key in config.values if key.startswith("lora_")]
        config.leave(*lora, why=f"{config.tool} trains all weights by this file")
    elif kind == "freeze":
        _freeze(config)
    elif kind in ("lora", "qlora"):
        _lora(config, defaults, is_quantized=kind == "qlora" or _has_four_bits(config))
    else:
        fix = "set lora, qlora or full there, or write the recipe: dtrain recipes"
        raise UserError(f"dtrain does not train {kind}", where=str(config.path), fix=fix)


def _has_four_bits(config: ForeignConfig) -> bool:
    return bool(config.get("load_in_4bit")) or config.number("quantization_bit") == 4


def _freeze(config: ForeignConfig) -> None:
    layers = config.number("freeze_trainable_layers")
    layers = 2 if layers is None else int(layers)
    if layers < 1:
        message = "dtrain trains the last layers, not the first"
        fix = "set freeze_trainable_layers to a positive number"
        raise UserError(message, where=f"{config.path}: freeze_trainable_layers", fix=fix)
    config.put(METHOD + "kind", "full", *KIND_KEYS)
    config.put(METHOD + "trainable_layers", layers, "freeze_trainable_layers")


def _lora(config: ForeignConfig, defaults: dict[str, Any], *, is_quantized: bool) -> None:
    rank = int(config.number(*RANK) or defaults["r"])
    alpha = config.number(*ALPHA) or defaults.get("alpha") or 2 * rank
    kind, why, changed = _kind(config, is_quantized)
    keys = [*KIND_KEYS, *(key for key in (*FOUR_BITS, *DORA) if config.get(key))]
    config.put(METHOD + "kind", kind, *keys, why=why, changed=changed)
    config.put(METHOD + "r", rank, *RANK)
    is_scaled = bool(config.get(*RSLORA)) and kind != "rslora"
    if is_scaled:
        alpha = round(alpha * sqrt(rank), 4)
    why = f"scaled by alpha / √r as in rslora, which {kind} is not" if is_scaled else ""
    config.put(METHOD + "alpha", alpha, *ALPHA, *(RSLORA if is_scaled else ()), why=why)
    if not is_scaled and kind == "rslora":
        config.put(METHOD + "kind", kind, *RSLORA)
    dropout = config.number(*DROPOUT)
    config.put(METHOD + "dropout", defaults["dropout"] if dropout is None else dropout, *DROPOUT)
    _targets(config)
    for key in ("lora_modules_to_save", "additional_target"):
        if names := config.names(key):
            config.put(METHOD + "modules_to_save", names, key)
    config.copy("lora_model_dir", "adapter_name_or_path", path=METHOD + "from_adapter")
    config.copy("loraplus_lr_ratio")
    config.copy("lora_rank_pattern", path=METHOD + "rank_pattern")
    config.copy("lora_alpha_pattern", path=METHOD + "alpha_pattern")
    if config.get("load_in_8bit") or config.number("quantization_bit") == 8:
        why = "the base stays in 16 bits; qlora keeps it in 4, and 8 are not supported"
        config.leave("load_in_8bit", "quantization_bit", why=why)
    config.put("output.merge", False, why=f"{config.tool} leaves the adapter; true also merges it")


def _kind(config: ForeignConfig, is_quantized: bool) -> tuple[str, str, bool]:
    """dtrain's kind, why, and whether it trains something else."""
    start = str(config.get("peft_init_lora_weights", "init_lora_weights") or "").lower()
    if config.get("pissa_init"):
        start = "pissa"
    if start.startswith(("pissa", "olora")):
        kind = start.partition("_")[0]
        why = f"{kind} starts from a base in 16 bits" if is_quantized else ""
        return kind, why, is_quantized
    if start == "loftq":
        return "loftq", "", False
    if config.get(*DORA):
        return ("qdora" if is_quantized else "dora"), "", False
    if config.get(*RSLORA) and not is_quantized:
        return "rslora", "", False
    return ("qlora" if is_quantized else "lora"), "", False


def _targets(config: ForeignConfig) -> None:
    path, names = METHOD + "target_modules", config.names(*TARGETS[1:])
    if config.get("lora_target_linear") or names in (["all"], ["all-linear"]):
        config.put(path, "all-linear", *TARGETS)
    elif pattern := next((name for name in names if not re.fullmatch(r"[\w.-]+", name)), ""):
        why = f"names are exact, and {pattern[:40]} is a pattern"
        config.put(path, "all-linear", *TARGETS, why=why, changed=True)
    elif names:
        config.put(path, names, *TARGETS)
    elif config.tool == "TRL":
        why = "PEFT would choose few layers, such as q_proj and v_proj, by the model's type"
        config.put(path, "all-linear", why=why, changed=True)
